"""A taskset of the verifiers package: the products of examples/tool_math, and a calculator.

`python -m products` is the calculator's server: the package starts it so.
"""

from __future__ import annotations

import re
from random import Random
from typing import Any

import verifiers.v1 as vf


class Calculator(vf.Toolset[vf.SharedToolsetConfig]):
    """Multiplies, over the Model Context Protocol."""

    TOOL_PREFIX = None  # the tool is called `calculator`, as in the warm start

    @vf.tool
    async def calculator(self, expression: str) -> str:
        """The value of a product such as 12*34."""
        factors = re.fullmatch(r"\s*(\d+)\s*\*\s*(\d+)\s*", expression)
        if factors is None:
            return "error: expected a product such as 12*34"
        return str(int(factors[1]) * int(factors[2]))


class ProductData(vf.TaskData):
    """The question, and what is right."""

    product: int


class Product(vf.Task[ProductData]):
    """Scores the last number of the last turn."""

    @vf.reward()
    async def correct(self, task: Any, trace: Any) -> float:
        numbers = re.findall(r"-?\d+", trace.last_reply)
        return float(bool(numbers) and int(numbers[-1]) == task.product)


class Products(vf.Taskset[Product, vf.TasksetConfig]):
    """1000 products, always the same."""

    @classmethod
    def toolsets(cls, config: vf.TasksetConfig) -> list[Any]:
        return [Calculator(vf.SharedToolsetConfig())]

    def load(self) -> Any:
        draw = Random(0)
        for _ in range(1000):
            a, b = draw.randrange(10, 100), draw.randrange(10, 100)
            data = ProductData(prompt=f"What is {a} * {b}?", product=a * b)
            yield Product(data, self.config.task)


__all__ = ["Products"]

if __name__ == "__main__":
    Calculator.run()
