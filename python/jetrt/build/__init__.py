"""Building engines from ONNX files."""
