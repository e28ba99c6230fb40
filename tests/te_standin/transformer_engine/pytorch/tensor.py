"""te.pytorch.tensor: a class that no tensor is an instance of."""


class QuantizedTensor:
    pass
