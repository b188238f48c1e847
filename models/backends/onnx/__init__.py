"""ONNX Runtime: layers exported from the unmodified modules. (The decoding loop does not use them yet.)"""
