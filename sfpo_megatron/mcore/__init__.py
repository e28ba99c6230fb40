"""The Megatron-Core binding: the only package that imports `megatron`."""
