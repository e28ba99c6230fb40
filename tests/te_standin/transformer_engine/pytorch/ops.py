"""te.pytorch.ops: names in Megatron's annotations (TEFusedMLP); nothing can be built."""


class FusibleOperation:
    pass


class Sequential:
    pass
