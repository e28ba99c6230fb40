"""What the commands of `sfpo-megatron` do, each in a module of its own; cli.py parses for them."""
