"""One training step, by a gradient tape or by Keras' fit, and evaluation."""
