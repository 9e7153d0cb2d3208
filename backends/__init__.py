"""From Programs to something that runs: eager, TorchScript, ONNX with ONNX Runtime."""
