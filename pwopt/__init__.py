"""pwopt: makes trained ONNX convolutional networks cheaper with 1×1 convolutions."""
