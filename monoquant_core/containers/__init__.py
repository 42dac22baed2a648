"""Containers of tensors, read within bounds: safetensors, torch.save, torch.export, model folders. Import no torch."""
