"""Math on [T] tensors: advantages, policy losses. No model, no process group."""
