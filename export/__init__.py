"""From quantized Keras models to `.tflite`, and checks of what was written."""
