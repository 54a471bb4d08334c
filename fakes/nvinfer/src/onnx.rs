//! As much of ONNX's protobuf as the stand-in needs, scanned by hand.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

use crate::abi::data_type;
use crate::plan::width;

#[derive(Default)]
pub struct Model {
    pub ir_version: u64,
    pub producer: String,
    pub opset: u64,
    pub metadata: HashMap<String, String>,
    pub graph: Graph,
    pub functions: Vec<String>,
}

#[derive(Default)]
pub struct Graph {
    pub nodes: Vec<Node>,
    pub initializers: Vec<Data>,
    pub inputs: Vec<Value>,
    pub outputs: Vec<Value>,
    pub values: Vec<Value>,
}

#[derive(Default, Clone)]
pub struct Node {
    pub op: String,
    pub domain: String,
    pub name: String,
    pub inputs: Vec<String>,
    pub outputs: Vec<String>,
    pub attributes: HashMap<String, Attribute>,
}

#[derive(Default, Clone)]
pub struct Attribute {
    pub f: f32,
    pub i: i64,
    pub ints: Vec<i64>,
    pub tensor: Option<Data>,
}

#[derive(Default, Clone)]
pub struct Value {
    pub name: String,
    pub dtype: i64,
    /// -1 with the name, where there is one; None: no shape is said.
    pub dims: Option<Vec<(i64, String)>>,
}

#[derive(Default, Clone)]
pub struct Data {
    pub name: String,
    pub dims: Vec<i64>,
    pub dtype: i64,
    raw: Vec<u8>,
    floats: Vec<f32>,
    ints: Vec<i64>,
    doubles: Vec<f64>,
    external: HashMap<String, String>,
    is_external: bool,
}

type Scan<T> = Result<T, String>;

/// A message's fields: number and content.
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Four([u8; 4]),
    Eight([u8; 8]),
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn varint(&mut self) -> Scan<u64> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            let (&byte, rest) = self.0.split_first().ok_or("the message ends inside a number")?;
            self.0 = rest;
            if shift < 64 {
                value |= u64::from(byte & 0x7F) << shift;
            }
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number of more than ten bytes".to_owned())
    }

    fn take(&mut self, n: usize) -> Scan<&'a [u8]> {
        if n > self.0.len() {
            return Err("the message ends inside a field".to_owned());
        }
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(head)
    }

    fn field(&mut self) -> Scan<Option<(u64, Field<'a>)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        if tag >> 3 == 0 {
            return Err("field number 0".to_owned());
        }
        let field = match tag & 7 {
            0 => Field::Number(self.varint()?),
            1 => Field::Eight(self.take(8)?.try_into().unwrap_or_default()),
            2 => {
                let n = self.varint()?;
                Field::Bytes(self.take(usize::try_from(n).unwrap_or(usize::MAX))?)
            }
            5 => Field::Four(self.take(4)?.try_into().unwrap_or_default()),
            kind => return Err(format!("wire type {kind}")),
        };
        Ok(Some((tag >> 3, field)))
    }
}

fn each<'a>(bytes: &'a [u8], mut take: impl FnMut(u64, Field<'a>) -> Scan<()>) -> Scan<()> {
    let mut reader = Reader(bytes);
    while let Some((number, field)) = reader.field()? {
        take(number, field)?;
    }
    Ok(())
}

fn text(bytes: &[u8]) -> Scan<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "a string that is not UTF-8".to_owned())
}

/// A repeated number, packed or not.
fn numbers(field: Field, to: &mut Vec<i64>) -> Scan<()> {
    match field {
        Field::Number(n) => to.push(n as i64),
        Field::Bytes(packed) => {
            let mut reader = Reader(packed);
            while !reader.0.is_empty() {
                to.push(reader.varint()? as i64);
            }
        }
        _ => return Err("a number of another kind".to_owned()),
    }
    Ok(())
}

fn entry(bytes: &[u8], to: &mut HashMap<String, String>) -> Scan<()> {
    let (mut key, mut value) = (String::new(), String::new());
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => key = text(b)?,
            (2, Field::Bytes(b)) => value = text(b)?,
            _ => {}
        }
        Ok(())
    })?;
    to.insert(key, value);
    Ok(())
}

fn data(bytes: &[u8]) -> Scan<Data> {
    let mut data = Data::default();
    each(bytes, |number, field| {
        match (number, field) {
            (1, field) => numbers(field, &mut data.dims)?,
            (2, Field::Number(n)) => data.dtype = n as i64,
            (4, Field::Bytes(b)) => data
                .floats
                .extend(b.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]]))),
            (4, Field::Four(b)) => data.floats.push(f32::from_le_bytes(b)),
            (5 | 7, field) => numbers(field, &mut data.ints)?,
            (8, Field::Bytes(b)) => data.name = text(b)?,
            (9, Field::Bytes(b)) => data.raw = b.to_vec(),
            (10, Field::Bytes(b)) => data
                .doubles
                .extend(b.chunks_exact(8).map(|c| f64::from_le_bytes(c.try_into().unwrap_or_default()))),
            (10, Field::Eight(b)) => data.doubles.push(f64::from_le_bytes(b)),
            (13, Field::Bytes(b)) => entry(b, &mut data.external)?,
            (14, Field::Number(n)) => data.is_external = n == 1,
            _ => {}
        }
        Ok(())
    })?;
    Ok(data)
}

fn value(bytes: &[u8]) -> Scan<Value> {
    let mut value = Value::default();
    let dim = |bytes: &[u8]| {
        let mut one = (-1, String::new());
        each(bytes, |number, field| {
            match (number, field) {
                (1, Field::Number(n)) => one.0 = n as i64,
                (2, Field::Bytes(b)) => one.1 = text(b)?,
                _ => {}
            }
            Ok(())
        })?;
        Ok::<_, String>(one)
    };
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => value.name = text(b)?,
            (2, Field::Bytes(kind)) => each(kind, |number, field| {
                let (1, Field::Bytes(tensor)) = (number, field) else {
                    return Ok(());
                };
                each(tensor, |number, field| {
                    match (number, field) {
                        (1, Field::Number(n)) => value.dtype = n as i64,
                        (2, Field::Bytes(shape)) => {
                            let mut dims = Vec::new();
                            each(shape, |number, field| {
                                if let (1, Field::Bytes(b)) = (number, field) {
                                    dims.push(dim(b)?);
                                }
                                Ok(())
                            })?;
                            value.dims = Some(dims);
                        }
                        _ => {}
                    }
                    Ok(())
                })
            })?,
            _ => {}
        }
        Ok(())
    })?;
    Ok(value)
}

fn attribute(bytes: &[u8]) -> Scan<(String, Attribute)> {
    let (mut name, mut attribute) = (String::new(), Attribute::default());
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => name = text(b)?,
            (2, Field::Four(b)) => attribute.f = f32::from_le_bytes(b),
            (3, Field::Number(n)) => attribute.i = n as i64,
            (5, Field::Bytes(b)) => attribute.tensor = Some(data(b)?),
            (8, field) => numbers(field, &mut attribute.ints)?,
            _ => {}
        }
        Ok(())
    })?;
    Ok((name, attribute))
}

fn node(bytes: &[u8]) -> Scan<Node> {
    let mut node = Node::default();
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Bytes(b)) => node.inputs.push(text(b)?),
            (2, Field::Bytes(b)) => node.outputs.push(text(b)?),
            (3, Field::Bytes(b)) => node.name = text(b)?,
            (4, Field::Bytes(b)) => node.op = text(b)?,
            (5, Field::Bytes(b)) => {
                let (name, one) = attribute(b)?;
                node.attributes.insert(name, one);
            }
            (7, Field::Bytes(b)) => node.domain = text(b)?,
            _ => {}
        }
        Ok(())
    })?;
    // As TensorRT's parser names a node that has no name.
    if node.name.is_empty() {
        if let Some(output) = node.outputs.first() {
            node.name = format!("node_of_{output}");
        }
    }
    Ok(node)
}

fn graph(bytes: &[u8]) -> Scan<Graph> {
    let mut graph = Graph::default();
    each(bytes, |number, field| {
        let Field::Bytes(b) = field else { return Ok(()) };
        match number {
            1 => graph.nodes.push(node(b)?),
            5 => graph.initializers.push(data(b)?),
            11 => graph.inputs.push(value(b)?),
            12 => graph.outputs.push(value(b)?),
            13 => graph.values.push(value(b)?),
            _ => {}
        }
        Ok(())
    })?;
    Ok(graph)
}

pub fn parse(bytes: &[u8]) -> Scan<Model> {
    let mut model = Model::default();
    each(bytes, |number, field| {
        match (number, field) {
            (1, Field::Number(n)) => model.ir_version = n,
            (2, Field::Bytes(b)) => model.producer = text(b)?,
            (7, Field::Bytes(b)) => model.graph = graph(b)?,
            (8, Field::Bytes(b)) => {
                let (mut domain, mut version) = (String::new(), 0);
                each(b, |number, field| {
                    match (number, field) {
                        (1, Field::Bytes(b)) => domain = text(b)?,
                        (2, Field::Number(n)) => version = n,
                        _ => {}
                    }
                    Ok(())
                })?;
                if domain.is_empty() || domain == "ai.onnx" {
                    model.opset = version;
                }
            }
            (14, Field::Bytes(b)) => entry(b, &mut model.metadata)?,
            (25, Field::Bytes(b)) => {
                let mut name = String::new();
                each(b, |number, field| {
                    if let (1, Field::Bytes(b)) = (number, field) {
                        name = text(b)?;
                    }
                    Ok(())
                })?;
                model.functions.push(name);
            }
            _ => {}
        }
        Ok(())
    })?;
    Ok(model)
}

/// ONNX's element type as TensorRT's; DOUBLE becomes float.
pub fn dtype(onnx: i64) -> Option<i32> {
    Some(match onnx {
        1 | 11 => data_type::FLOAT,
        2 => data_type::UINT8,
        3 => data_type::INT8,
        6 => data_type::INT32,
        7 => data_type::INT64,
        9 => data_type::BOOL,
        10 => data_type::HALF,
        16 => data_type::BF16,
        17 => data_type::FP8,
        22 => data_type::INT4,
        23 => data_type::FP4,
        _ => return None,
    })
}

impl Graph {
    pub fn initializer(&self, name: &str) -> Option<&Data> {
        self.initializers.iter().find(|data| data.name == name)
    }

    pub fn producer(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.outputs.iter().any(|output| output == name))
    }

    pub fn is_input(&self, name: &str) -> bool {
        self.inputs.iter().any(|input| input.name == name) && self.initializer(name).is_none()
    }
}

impl Node {
    pub fn int(&self, name: &str, default: i64) -> i64 {
        self.attributes.get(name).map_or(default, |a| a.i)
    }
}

impl Data {
    pub fn count(&self) -> usize {
        let sizes = self.dims.iter().map(|&d| d.max(0) as usize);
        sizes.fold(1, usize::saturating_mul)
    }

    /// Where the values are, for external data; the error is the line that TensorRT logs.
    fn place(&self, model: Option<&Path>) -> Result<(PathBuf, u64, usize), String> {
        let location = self.external.get("location").map_or("", String::as_str);
        if location.split('/').any(|part| part == "..") {
            return Err(format!(
                "Relative paths to parent (../) are not allowed in ONNX external weights! Normalized path is: {location}"
            ));
        }
        let number = |key: &str| self.external.get(key).and_then(|n| n.parse::<u64>().ok());
        let path = model.and_then(Path::parent).unwrap_or(Path::new("")).join(location);
        let offset = number("offset").unwrap_or(0);
        let size = path
            .metadata()
            .map_err(|_| format!("Failed to open file: {}", path.display()))?
            .len();
        let length = number("length").unwrap_or(size.saturating_sub(offset));
        if offset.saturating_add(length) > size {
            return Err(format!("Failed to read weights from external file: {}", path.display()));
        }
        let each = if self.dtype == 11 { 8 } else { dtype(self.dtype).map_or(0, width) };
        let wanted = self.count().saturating_mul(each);
        if wanted > 0 && wanted as u64 != length {
            return Err(format!(
                "Unexpected size for the external weights! Expected size: {wanted} bytes (shape = {:?}). Actual size: {length} bytes.",
                self.dims
            ));
        }
        Ok((path, offset, length as usize))
    }

    /// Whether the values can be had, without reading them.
    pub fn check(&self, model: Option<&Path>) -> Result<(), String> {
        if dtype(self.dtype).is_none() {
            return Err(format!(
                "Found unsupported datatype ({}) when importing initializer: {}",
                self.dtype, self.name
            ));
        }
        if self.is_external {
            return self.place(model).map(|_| ());
        }
        Ok(())
    }

    /// The values as floats.
    pub fn values(&self, model: Option<&Path>) -> Result<Vec<f32>, String> {
        self.check(model)?;
        let read;
        let raw: &[u8] = if self.is_external {
            use std::os::unix::fs::FileExt;
            let (path, offset, length) = self.place(model)?;
            let mut bytes = vec![0; length];
            let done = std::fs::File::open(&path).and_then(|file| file.read_exact_at(&mut bytes, offset));
            done.map_err(|_| format!("Failed to read weights from external file: {}", path.display()))?;
            read = bytes;
            &read
        } else {
            &self.raw
        };
        let two = |c: &[u8]| u16::from_le_bytes([c[0], c[1]]);
        let four = |c: &[u8]| [c[0], c[1], c[2], c[3]];
        let eight = |c: &[u8]| <[u8; 8]>::try_from(c).unwrap_or_default();
        let values: Vec<f32> = if !raw.is_empty() {
            match self.dtype {
                1 => raw.chunks_exact(4).map(|c| f32::from_le_bytes(four(c))).collect(),
                6 => raw.chunks_exact(4).map(|c| i32::from_le_bytes(four(c)) as f32).collect(),
                7 => raw.chunks_exact(8).map(|c| i64::from_le_bytes(eight(c)) as f32).collect(),
                11 => raw.chunks_exact(8).map(|c| f64::from_le_bytes(eight(c)) as f32).collect(),
                10 => raw.chunks_exact(2).map(|c| f16::from_bits(two(c)).to_f32()).collect(),
                16 => raw.chunks_exact(2).map(|c| bf16::from_bits(two(c)).to_f32()).collect(),
                3 => raw.iter().map(|&b| f32::from(b as i8)).collect(),
                _ => raw.iter().map(|&b| f32::from(b)).collect(),
            }
        } else if !self.floats.is_empty() {
            self.floats.clone()
        } else if !self.doubles.is_empty() {
            self.doubles.iter().map(|&x| x as f32).collect()
        } else {
            match self.dtype {
                10 => self.ints.iter().map(|&i| f16::from_bits(i as u16).to_f32()).collect(),
                16 => self.ints.iter().map(|&i| bf16::from_bits(i as u16).to_f32()).collect(),
                _ => self.ints.iter().map(|&i| i as f32).collect(),
            }
        };
        if values.len() != self.count() {
            return Err(format!(
                "Size mismatch when importing initializer: {}. Expected size: {}",
                self.name,
                self.count()
            ));
        }
        Ok(values)
    }
}
