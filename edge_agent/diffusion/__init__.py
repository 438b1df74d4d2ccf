"""Latent diffusion with numpy and onnxruntime: from token states to pixels, without torch."""
