"""Learning by gradients: an ONNX graph as a torch network, trained to do what the original does."""
