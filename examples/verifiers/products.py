"""A taskset of the verifiers package: the products of examples/tool_math, answered at once."""

from __future__ import annotations

import re
from random import Random
from typing import Any

import verifiers.v1 as vf


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

    def load(self) -> Any:
        draw = Random(0)
        for _ in range(1000):
            a, b = draw.randrange(10, 100), draw.randrange(10, 100)
            data = ProductData(prompt=f"What is {a} * {b}?", product=a * b)
            yield Product(data, self.config.task)


__all__ = ["Products"]
