"""What one training step computes: by a gradient tape, or by Keras' fit."""
