"""Weights from Megatron shards into engines and onto disk: source, transports, refit, export."""
