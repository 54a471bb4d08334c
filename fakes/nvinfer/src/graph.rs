//! A small interpreter for the models that the stand-in can build itself: each layer computes in the precision that it was built with.

use std::collections::HashMap;

use half::{bf16, f16};
use serde_json::{json, Map, Value};

use crate::onnx;

/// What the interpreter computes.
pub const OPS: [&str; 42] = [
    "Identity",
    "Dropout",
    "Cast",
    "Constant",
    "MatMul",
    "Gemm",
    "Conv",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Max",
    "Min",
    "Relu",
    "Sigmoid",
    "Tanh",
    "Gelu",
    "Erf",
    "Exp",
    "Log",
    "Sqrt",
    "Neg",
    "Abs",
    "Reciprocal",
    "LeakyRelu",
    "Clip",
    "Softmax",
    "LayerNormalization",
    "ReduceMean",
    "ReduceSum",
    "GlobalAveragePool",
    "MaxPool",
    "Transpose",
    "Reshape",
    "Flatten",
    "Unsqueeze",
    "Squeeze",
    "Concat",
    "QuantizeLinear",
    "DequantizeLinear",
    "Sum",
];

#[derive(Clone, Default, Debug)]
pub struct Array {
    pub dims: Vec<usize>,
    pub values: Vec<f64>,
}

pub struct Step {
    op: String,
    inputs: Vec<String>,
    outputs: Vec<String>,
    precision: String,
    ints: HashMap<String, Vec<i64>>,
    floats: HashMap<String, f64>,
    /// Scales of the inputs, for int8 without Q/DQ.
    scales: Vec<Option<f64>>,
}

#[derive(Default)]
pub struct Graph {
    pub steps: Vec<Step>,
    pub weights: HashMap<String, Array>,
}

pub type Done<T> = Result<T, String>;

// In and out of the plan ---------------------------------------------------------------------------------------------

/// The nodes as the plan's JSON holds them; precision and scales are added by the builder.
pub fn describe(node: &onnx::Node) -> Map<String, Value> {
    let (mut ints, mut floats) = (Map::new(), Map::new());
    for (name, attribute) in &node.attributes {
        let list = if attribute.ints.is_empty() {
            vec![attribute.i]
        } else {
            attribute.ints.clone()
        };
        ints.insert(name.clone(), json!(list));
        floats.insert(name.clone(), json!(attribute.f));
    }
    let content = json!({"op": node.op, "in": node.inputs, "out": node.outputs, "ints": ints, "floats": floats});
    content.as_object().cloned().unwrap_or_default()
}

pub fn describe_weights(dims: &[i64], values: &[f32]) -> Value {
    json!({"dims": dims, "values": values})
}

fn strings(value: &Value) -> Vec<String> {
    crate::faults::strings(value)
}

pub fn read_weights(value: &Value) -> HashMap<String, Array> {
    let mut weights = HashMap::new();
    for (name, one) in value.as_object().into_iter().flatten() {
        let dims: Vec<usize> = one["dims"]
            .as_array()
            .map_or_else(Vec::new, |d| d.iter().filter_map(Value::as_u64).map(|d| d as usize).collect());
        let count = dims.iter().product();
        let mut values: Vec<f64> = one["values"]
            .as_array()
            .map_or_else(Vec::new, |v| v.iter().map(|x| x.as_f64().unwrap_or(f64::NAN)).collect());
        // A stripped plan has the sizes alone.
        values.resize(count, 0.0);
        weights.insert(name.clone(), Array { dims, values });
    }
    weights
}

pub fn read(value: &Value) -> Graph {
    let mut steps = Vec::new();
    for one in value["nodes"].as_array().into_iter().flatten() {
        let list = |value: &Value| {
            value
                .as_array()
                .map_or_else(Vec::new, |v| v.iter().filter_map(Value::as_i64).collect())
        };
        steps.push(Step {
            op: one["op"].as_str().unwrap_or("").to_owned(),
            inputs: strings(&one["in"]),
            outputs: strings(&one["out"]),
            precision: one["precision"].as_str().unwrap_or("float32").to_owned(),
            ints: one["ints"]
                .as_object()
                .map_or_else(HashMap::new, |m| m.iter().map(|(k, v)| (k.clone(), list(v))).collect()),
            floats: one["floats"].as_object().map_or_else(HashMap::new, |m| {
                m.iter().map(|(k, v)| (k.clone(), v.as_f64().unwrap_or(0.0))).collect()
            }),
            scales: one["scales"]
                .as_array()
                .map_or_else(Vec::new, |v| v.iter().map(Value::as_f64).collect()),
        });
    }
    Graph {
        steps,
        weights: read_weights(&value["weights"]),
    }
}

// Numbers ------------------------------------------------------------------------------------------------------------

pub fn round(precision: &str, x: f64) -> f64 {
    match precision {
        "float16" => f16::from_f64(x).to_f64(),
        "bfloat16" => f64::from(bf16::from_f32(x as f32).to_f32()),
        "int32" | "int64" | "bool" | "uint8" => x.trunc(),
        "tf32" => f64::from(f32::from_bits((x as f32).to_bits().wrapping_add(0x1000) & !0x1FFF)),
        _ => f64::from(x as f32),
    }
}

fn quantized(x: f64, scale: f64) -> f64 {
    (x / scale).round_ties_even().clamp(-128.0, 127.0) * scale
}

fn strides(dims: &[usize]) -> Vec<usize> {
    let mut result = vec![1; dims.len()];
    for d in (1..dims.len()).rev() {
        result[d - 1] = result[d] * dims[d];
    }
    result
}

fn broadcast(a: &[usize], b: &[usize]) -> Done<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |dims: &[usize], d: usize| if d + dims.len() < rank { 1 } else { dims[d + dims.len() - rank] };
    (0..rank)
        .map(|d| match (at(a, d), at(b, d)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            (x, y) => Err(format!("sizes {x} and {y} do not go together")),
        })
        .collect()
}

impl Array {
    pub fn zeros(dims: &[usize]) -> Array {
        Array {
            dims: dims.to_vec(),
            values: vec![0.0; dims.iter().product()],
        }
    }

    fn map(&self, f: impl Fn(f64) -> f64) -> Array {
        Array {
            dims: self.dims.clone(),
            values: self.values.iter().map(|&x| f(x)).collect(),
        }
    }

    /// Repeated to these dimensions.
    fn spread(&self, dims: &[usize]) -> Array {
        if self.dims == dims {
            return self.clone();
        }
        let own = strides(&self.dims);
        let skip = dims.len() - self.dims.len();
        let whole = strides(dims);
        let mut result = Array::zeros(dims);
        for (i, value) in result.values.iter_mut().enumerate() {
            let mut from = 0;
            for d in 0..self.dims.len() {
                if self.dims[d] > 1 {
                    from += (i / whole[d + skip]) % dims[d + skip] * own[d];
                }
            }
            *value = self.values[from];
        }
        result
    }

    fn with(&self, other: &Array, f: impl Fn(f64, f64) -> f64) -> Done<Array> {
        let dims = broadcast(&self.dims, &other.dims)?;
        let (mut a, b) = (self.spread(&dims), other.spread(&dims));
        for (x, y) in a.values.iter_mut().zip(b.values) {
            *x = f(*x, y);
        }
        Ok(a)
    }

    fn transposed(&self, order: &[usize]) -> Array {
        let dims: Vec<usize> = order.iter().map(|&d| self.dims[d]).collect();
        let (from, to) = (strides(&self.dims), strides(&dims));
        let mut result = Array::zeros(&dims);
        for (i, value) in result.values.iter_mut().enumerate() {
            let at: usize = (0..dims.len()).map(|d| (i / to[d]) % dims[d] * from[order[d]]).sum();
            *value = self.values[at];
        }
        result
    }

    fn shaped(&self, dims: Vec<usize>) -> Done<Array> {
        if dims.iter().product::<usize>() != self.values.len() {
            return Err(format!("{:?} cannot become {dims:?}", self.dims));
        }
        Ok(Array {
            dims,
            values: self.values.clone(),
        })
    }

    /// Rows along the last axis.
    fn by_rows(&self, f: impl Fn(&mut [f64])) -> Array {
        let mut result = self.clone();
        let n = self.dims.last().copied().unwrap_or(1).max(1);
        for row in result.values.chunks_mut(n) {
            f(row);
        }
        result
    }
}

fn matmul(a: &Array, b: &Array) -> Done<Array> {
    if a.dims.len() < 2 || b.dims.len() < 2 {
        return Err("MatMul of less than two dimensions".to_owned());
    }
    let (m, k) = (a.dims[a.dims.len() - 2], a.dims[a.dims.len() - 1]);
    let n = b.dims[b.dims.len() - 1];
    if b.dims[b.dims.len() - 2] != k {
        return Err(format!("MatMul of {:?} and {:?}", a.dims, b.dims));
    }
    let batch = broadcast(&a.dims[..a.dims.len() - 2], &b.dims[..b.dims.len() - 2])?;
    let whole = |last: [usize; 2]| batch.iter().copied().chain(last).collect::<Vec<_>>();
    let (a, b) = (a.spread(&whole([m, k])), b.spread(&whole([k, n])));
    let mut result = Array::zeros(&whole([m, n]));
    for (i, value) in result.values.iter_mut().enumerate() {
        let (which, row, column) = (i / (m * n).max(1), i / n.max(1) % m.max(1), i % n.max(1));
        let sum: f64 = (0..k)
            .map(|d| a.values[(which * m + row) * k + d] * b.values[(which * k + d) * n + column])
            .sum();
        *value = f64::from(sum as f32);
    }
    Ok(result)
}

// Layers -------------------------------------------------------------------------------------------------------------

impl Step {
    fn list(&self, name: &str, default: &[i64]) -> Vec<i64> {
        self.ints.get(name).cloned().unwrap_or_else(|| default.to_vec())
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        self.ints.get(name).and_then(|v| v.first().copied()).unwrap_or(default)
    }

    fn float(&self, name: &str, default: f64) -> f64 {
        self.floats.get(name).copied().unwrap_or(default)
    }

    fn axes(&self, given: Option<&Array>, rank: usize) -> Vec<usize> {
        let list = match given {
            Some(array) => array.values.iter().map(|&x| x as i64).collect(),
            None => self.list("axes", &[]),
        };
        list.iter()
            .map(|&a| if a < 0 { (a + rank as i64) as usize } else { a as usize })
            .collect()
    }

    /// An operand of a matrix product or convolution, as the kernel reads it.
    fn operand(&self, i: usize, array: &Array) -> Array {
        match self.precision.as_str() {
            "int8" => match self.scales.get(i).copied().flatten() {
                Some(scale) if scale > 0.0 => array.map(|x| quantized(x, scale)),
                _ => {
                    let most = array.values.iter().fold(0.0f64, |most, x| most.max(x.abs()));
                    array.map(|x| if most > 0.0 { quantized(x, most / 127.0) } else { 0.0 })
                }
            },
            // What comes out of Q/DQ is exact in its own type.
            "explicit" => array.clone(),
            precision => array.map(|x| round(precision, x)),
        }
    }

    fn run(&self, inputs: &[Option<&Array>]) -> Done<Array> {
        let input = |i: usize| {
            inputs
                .get(i)
                .copied()
                .flatten()
                .ok_or_else(|| format!("{} lacks its input {i}", self.op))
        };
        let optional = |i: usize| inputs.get(i).copied().flatten();
        let precision = self.precision.as_str();
        let rounded = |array: Array| match precision {
            "int8" | "explicit" | "tf32" => array.map(|x| round("float32", x)),
            _ => array.map(|x| round(precision, x)),
        };
        let each = |f: fn(f64) -> f64| Ok::<_, String>(input(0)?.map(f));
        let fold = |f: fn(f64, f64) -> f64| {
            let mut all = input(0)?.clone();
            for other in inputs.iter().skip(1).flatten() {
                all = all.with(other, f)?;
            }
            Ok::<_, String>(all)
        };
        let result = match self.op.as_str() {
            "Identity" | "Dropout" | "Cast" => input(0)?.clone(),
            "MatMul" => matmul(&self.operand(0, input(0)?), &self.operand(1, input(1)?))?,
            "Gemm" => {
                let turned = |array: Array, name: &str| if self.int(name, 0) != 0 { array.transposed(&[1, 0]) } else { array };
                let a = turned(self.operand(0, input(0)?), "transA");
                let b = turned(self.operand(1, input(1)?), "transB");
                let (alpha, beta) = (self.float("alpha", 1.0), self.float("beta", 1.0));
                let product = matmul(&a, &b)?.map(|x| x * alpha);
                match optional(2) {
                    Some(c) => product.with(&c.map(|x| x * beta), |x, y| x + y)?,
                    None => product,
                }
            }
            "Conv" => self.conv(&self.operand(0, input(0)?), &self.operand(1, input(1)?), optional(2))?,
            "Add" | "Sum" => fold(|x, y| x + y)?,
            "Sub" => fold(|x, y| x - y)?,
            "Mul" => fold(|x, y| x * y)?,
            "Div" => fold(|x, y| x / y)?,
            "Pow" => fold(f64::powf)?,
            "Max" => fold(f64::max)?,
            "Min" => fold(f64::min)?,
            "Relu" => each(|x| x.max(0.0))?,
            "Sigmoid" => each(|x| 1.0 / (1.0 + (-x).exp()))?,
            "Tanh" => each(f64::tanh)?,
            "Erf" => each(erf)?,
            "Gelu" => each(|x| 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)))?,
            "Exp" => each(f64::exp)?,
            "Log" => each(f64::ln)?,
            "Sqrt" => each(f64::sqrt)?,
            "Neg" => each(|x| -x)?,
            "Abs" => each(f64::abs)?,
            "Reciprocal" => each(|x| 1.0 / x)?,
            "LeakyRelu" => {
                let alpha = self.float("alpha", 0.01);
                input(0)?.map(|x| if x < 0.0 { alpha * x } else { x })
            }
            "Clip" => {
                let bound = |i: usize, name: &str, default: f64| {
                    optional(i)
                        .and_then(|a| a.values.first().copied())
                        .unwrap_or_else(|| self.float(name, default))
                };
                let (low, high) = (bound(1, "min", f64::NEG_INFINITY), bound(2, "max", f64::INFINITY));
                input(0)?.map(|x| x.max(low).min(high))
            }
            "Softmax" => {
                let x = input(0)?;
                let last = x.dims.len() as i64 - 1;
                if !matches!(self.int("axis", -1), -1) && self.int("axis", -1) != last {
                    return Err("Softmax over another axis than the last".to_owned());
                }
                x.by_rows(|row| {
                    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = row.iter().map(|x| (x - most).exp()).sum();
                    row.iter_mut().for_each(|x| *x = (*x - most).exp() / sum);
                })
            }
            "LayerNormalization" => self.layer_norm(input(0)?, input(1)?, optional(2))?,
            "ReduceMean" | "ReduceSum" => {
                let x = input(0)?;
                let axes = self.axes(optional(1), x.dims.len());
                let count = if self.op == "ReduceSum" {
                    1
                } else if axes.is_empty() {
                    x.values.len()
                } else {
                    axes.iter().map(|&d| x.dims[d]).product()
                };
                sum(x, &axes, self.int("keepdims", 1) != 0).map(|x| x / count as f64)
            }
            "GlobalAveragePool" => {
                let x = input(0)?;
                let axes: Vec<usize> = (2..x.dims.len()).collect();
                let count: usize = x.dims[2..].iter().product();
                sum(x, &axes, true).map(|x| x / count as f64)
            }
            "MaxPool" => self.max_pool(input(0)?)?,
            "Transpose" => {
                let x = input(0)?;
                let order: Vec<i64> = (0..x.dims.len() as i64).rev().collect();
                let order: Vec<usize> = self.list("perm", &order).iter().map(|&d| d as usize).collect();
                x.transposed(&order)
            }
            "Reshape" => {
                let x = input(0)?;
                let mut wanted: Vec<i64> = input(1)?.values.iter().map(|&d| d as i64).collect();
                for (d, size) in wanted.iter_mut().enumerate() {
                    if *size == 0 {
                        *size = x.dims.get(d).copied().unwrap_or(1) as i64;
                    }
                }
                let known: i64 = wanted.iter().filter(|&&d| d >= 0).product();
                let rest = x.values.len() as i64 / known.max(1);
                x.shaped(wanted.iter().map(|&d| if d < 0 { rest } else { d } as usize).collect())?
            }
            "Flatten" => {
                let x = input(0)?;
                let axis = self.axes(
                    Some(&Array {
                        dims: vec![1],
                        values: vec![self.int("axis", 1) as f64],
                    }),
                    x.dims.len(),
                )[0];
                x.shaped(vec![x.dims[..axis].iter().product(), x.dims[axis..].iter().product()])?
            }
            "Unsqueeze" => {
                let x = input(0)?;
                let n = optional(1).map_or_else(|| self.list("axes", &[]).len(), |a| a.values.len());
                let mut axes = self.axes(optional(1), x.dims.len() + n);
                axes.sort_unstable();
                let mut dims = x.dims.clone();
                axes.iter().for_each(|&axis| dims.insert(axis, 1));
                x.shaped(dims)?
            }
            "Squeeze" => {
                let x = input(0)?;
                let axes = self.axes(optional(1), x.dims.len());
                let keep = |d: usize| if axes.is_empty() { x.dims[d] != 1 } else { !axes.contains(&d) };
                x.shaped((0..x.dims.len()).filter(|&d| keep(d)).map(|d| x.dims[d]).collect())?
            }
            "Concat" => {
                let first = input(0)?;
                let axis = self.int("axis", 0);
                let axis = if axis < 0 { axis + first.dims.len() as i64 } else { axis } as usize;
                let mut dims = first.dims.clone();
                dims[axis] = inputs.iter().flatten().map(|a| a.dims[axis]).sum();
                let outer: usize = dims[..axis].iter().product();
                let mut values = Vec::new();
                for row in 0..outer {
                    for one in inputs.iter().flatten() {
                        let inner: usize = one.dims[axis..].iter().product();
                        values.extend_from_slice(&one.values[row * inner..(row + 1) * inner]);
                    }
                }
                Array { dims, values }
            }
            "QuantizeLinear" => {
                let (x, scale) = (input(0)?, self.channels(input(0)?, input(1)?));
                return x.with(&scale, |x, s| (x / s).round_ties_even().clamp(-128.0, 127.0));
            }
            "DequantizeLinear" => {
                let (x, scale) = (input(0)?, self.channels(input(0)?, input(1)?));
                return x.with(&scale, |x, s| x * s);
            }
            other => return Err(format!("the stand-in does not compute {other}")),
        };
        Ok(rounded(result))
    }

    /// A scale, along its axis when there is one for each channel.
    fn channels(&self, x: &Array, scale: &Array) -> Array {
        if scale.values.len() < 2 {
            return scale.clone();
        }
        let axis = self.int("axis", 1);
        let axis = if axis < 0 { axis + x.dims.len() as i64 } else { axis } as usize;
        let mut dims = vec![1; x.dims.len()];
        dims[axis] = scale.values.len();
        Array {
            dims,
            values: scale.values.clone(),
        }
    }

    fn layer_norm(&self, x: &Array, scale: &Array, bias: Option<&Array>) -> Done<Array> {
        let axis = self.int("axis", -1);
        if axis != -1 && axis != x.dims.len() as i64 - 1 {
            return Err("LayerNormalization over more than the last axis".to_owned());
        }
        let epsilon = self.float("epsilon", 1e-5);
        // The squares are held in the layer's precision, where those of large values overflow.
        let normal = x.by_rows(|row| {
            let n = row.len() as f64;
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| round(&self.precision, (x - mean) * (x - mean))).sum::<f64>() / n;
            row.iter_mut().for_each(|x| *x = (*x - mean) / (variance + epsilon).sqrt());
        });
        let scaled = normal.with(scale, |x, y| x * y)?;
        bias.map_or(Ok(scaled.clone()), |bias| scaled.with(bias, |x, y| x + y))
    }

    fn windows(&self, x: &Array, kernel: &[usize]) -> Done<[usize; 8]> {
        if x.dims.len() != 4 || kernel.len() != 2 {
            return Err(format!("{} of other than two dimensions", self.op));
        }
        let strides = self.list("strides", &[1, 1]);
        let pads = self.list("pads", &[0; 4]);
        let size = |d: usize| (x.dims[2 + d] as i64 + pads[d] + pads[d + 2] - kernel[d] as i64) / strides[d] + 1;
        Ok([
            size(0).max(0),
            size(1).max(0),
            strides[0],
            strides[1],
            pads[0],
            pads[1],
            kernel[0] as i64,
            kernel[1] as i64,
        ]
        .map(|n| n as usize))
    }

    fn conv(&self, x: &Array, w: &Array, bias: Option<&Array>) -> Done<Array> {
        if self.int("group", 1) != 1 || self.list("dilations", &[1, 1]).iter().any(|&d| d != 1) {
            return Err("Conv with groups or dilations".to_owned());
        }
        let [height, width, sy, sx, py, px, ky, kx] = self.windows(x, &w.dims[2..])?;
        let (n, channels, rows, columns) = (x.dims[0], x.dims[1], x.dims[2], x.dims[3]);
        let mut result = Array::zeros(&[n, w.dims[0], height, width]);
        for (i, value) in result.values.iter_mut().enumerate() {
            let (column, row) = (i % width, i / width % height);
            let (out, image) = (i / (width * height) % w.dims[0], i / (width * height) / w.dims[0]);
            let mut sum = bias.map_or(0.0, |b| b.values[out]);
            for c in 0..channels {
                for dy in 0..ky {
                    for dx in 0..kx {
                        let (y, z) = (row * sy + dy, column * sx + dx);
                        if y < py || z < px || y - py >= rows || z - px >= columns {
                            continue;
                        }
                        sum += x.values[((image * channels + c) * rows + y - py) * columns + z - px]
                            * w.values[((out * channels + c) * ky + dy) * kx + dx];
                    }
                }
            }
            *value = f64::from(sum as f32);
        }
        Ok(result)
    }

    fn max_pool(&self, x: &Array) -> Done<Array> {
        let kernel: Vec<usize> = self.list("kernel_shape", &[]).iter().map(|&k| k as usize).collect();
        let [height, width, sy, sx, py, px, ky, kx] = self.windows(x, &kernel)?;
        let (rows, columns) = (x.dims[2], x.dims[3]);
        let mut result = Array::zeros(&[x.dims[0], x.dims[1], height, width]);
        for (i, value) in result.values.iter_mut().enumerate() {
            let (column, row, plane) = (i % width, i / width % height, i / (width * height));
            *value = f64::NEG_INFINITY;
            for (dy, dx) in (0..ky).flat_map(|dy| (0..kx).map(move |dx| (dy, dx))) {
                let (y, z) = (row * sy + dy, column * sx + dx);
                if y >= py && z >= px && y - py < rows && z - px < columns {
                    *value = value.max(x.values[(plane * rows + y - py) * columns + z - px]);
                }
            }
        }
        Ok(result)
    }
}

fn sum(x: &Array, axes: &[usize], keep: bool) -> Array {
    let gone = |d: usize| axes.is_empty() || axes.contains(&d);
    let dims: Vec<usize> = (0..x.dims.len()).map(|d| if gone(d) { 1 } else { x.dims[d] }).collect();
    let (from, to) = (strides(&x.dims), strides(&dims));
    let mut result = Array::zeros(&dims);
    for (i, value) in x.values.iter().enumerate() {
        let at: usize = (0..dims.len()).filter(|&d| !gone(d)).map(|d| i / from[d] % x.dims[d] * to[d]).sum();
        result.values[at] += value;
    }
    if !keep {
        result.dims = (0..x.dims.len()).filter(|&d| !gone(d)).map(|d| x.dims[d]).collect();
    }
    result
}

/// Abramowitz and Stegun 7.1.26 is good to 1.5e-7 only; this continued fraction and series are good to about 1e-15.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 2.5 {
        let (mut term, mut sum) = (a, a);
        for n in 1..80 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let mut fraction = 0.0;
        for n in (1..80).rev() {
            fraction = f64::from(n) / 2.0 / (a + fraction);
        }
        1.0 - (-a * a).exp() / (a + fraction) / std::f64::consts::PI.sqrt()
    };
    value.copysign(x)
}

impl Graph {
    /// Every tensor's value for these inputs.
    pub fn run(&self, inputs: &HashMap<String, Array>, weights: &HashMap<String, Array>) -> Done<HashMap<String, Array>> {
        let mut values: HashMap<String, Array> = inputs.clone();
        for step in &self.steps {
            let given: Vec<Option<&Array>> = step
                .inputs
                .iter()
                .map(|name| values.get(name).or_else(|| weights.get(name)))
                .collect();
            if let Some((name, _)) = step.inputs.iter().zip(&given).find(|(name, one)| !name.is_empty() && one.is_none()) {
                return Err(format!("no value for {name}"));
            }
            // A Constant's value is a weight by the name of its output.
            let result = match step.op.as_str() {
                "Constant" => step
                    .outputs
                    .first()
                    .and_then(|name| weights.get(name).cloned())
                    .ok_or("a constant is lost")?,
                // What a wrong model says may be out of any range.
                _ => std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| step.run(&given)))
                    .unwrap_or_else(|_| Err(format!("{} makes no sense", step.op)))?,
            };
            if let Some(name) = step.outputs.first() {
                values.insert(name.clone(), result);
            }
        }
        Ok(values)
    }
}
