"""The science: pure functions of tensors. No files, no models, no transformers."""
