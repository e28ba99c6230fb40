"""A reward of your own: 1 for the right number, 0.1 for any number, and how often it is one."""

from sfpo_megatron.rewards import Problem


def score(response: str, prompt: Problem) -> dict[str, float]:
    text = response.rpartition("Answer:")[2].strip()
    is_number = text.removeprefix("-").isdecimal()
    is_right = text == prompt.answer.strip()
    return {"reward": 1.0 if is_right else 0.1 * is_number, "number": is_number}
