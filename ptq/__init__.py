"""Post-training quantization: a float model and images in, a calibrated quantized model out."""
