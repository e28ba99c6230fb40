"""Chat completions as JSON: what a request may hold, and its answers and errors.

What would change how tokens are drawn is refused: they are trained on as draws of the run's own
temperature and top_p.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from sfpo_megatron.data.strict_json import MOST_DEEP, is_deeper, read_strict
from sfpo_megatron.data.turns import Message
from sfpo_megatron.data.values import is_text
from sfpo_megatron.errors import shortened

JsonObject: TypeAlias = dict[str, Any]


class ApiError(Exception):
    """An answer that is an error, in the protocol's own form."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> JsonObject:
        """The JSON of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(kw_only=True, frozen=True, slots=True)
class ChatRequest:
    """What a client asks for."""

    messages: tuple[Message, ...]
    tools: str
    """The tools that the model is told of, as JSON; empty where there are none."""
    max_tokens: int | None
    logprobs: bool
    stream: bool
    include_usage: bool
    model: str


@dataclass(kw_only=True, frozen=True, slots=True)
class Sampling:
    """How the run draws tokens."""

    temperature: float
    top_p: float


@dataclass(kw_only=True, frozen=True, slots=True)
class Answer:
    """The model's turn."""

    id: str
    message: Message
    finish_reason: str
    tokens: tuple[tuple[str, float], ...]  # text and log-prob of each
    num_prompt_tokens: int

    @property
    def usage(self) -> JsonObject:
        """Counts of tokens."""
        told, said = self.num_prompt_tokens, len(self.tokens)
        return {"prompt_tokens": told, "completion_tokens": said, "total_tokens": told + said}


# ---- requests ----------------------------------------------------------------------------------

_IGNORED = ("user", "metadata", "store", "prompt_cache_key", "safety_identifier", "service_tier")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([],),
    "seed": (),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
}
"""What may be sent with a value that changes nothing, beside null."""
_READ = (
    *("model", "messages", "tools", "max_tokens", "max_completion_tokens", "temperature", "top_p"),
    *("logprobs", "stream", "stream_options"),
)


def parse_request(body: bytes, sampling: Sampling) -> ChatRequest:
    """The request; ApiError for what is none, or cannot be answered exactly."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ApiError("the body is no JSON object")
    if is_deeper(tree, MOST_DEEP):
        raise ApiError(f"the body is nested deeper than {MOST_DEEP} lists and objects")
    given = {key: value for key, value in tree.items() if value is not None}
    if not given.get("tools") and given.get("tool_choice") == "none":
        del given["tool_choice"]  # the protocol's own default where there are no tools
    for key, value in given.items():
        _check_parameter(key, value)
    _check_sampling(given, sampling)
    limits = [_count(given, key) for key in ("max_tokens", "max_completion_tokens") if key in given]
    options = _typed(given, "stream_options", dict, {})
    return ChatRequest(
        messages=_messages(given.get("messages")),
        tools=_tools(given.get("tools", [])),
        max_tokens=min(limits, default=None),
        logprobs=_typed(given, "logprobs", bool, False),
        stream=_typed(given, "stream", bool, False),
        include_usage=options.get("include_usage") is True,
        model=_typed(given, "model", str, "policy"),
    )


def _check_parameter(key: str, value: Any) -> None:
    if key in _READ or key in _IGNORED:
        return
    if key not in _NEUTRAL:
        raise ApiError(
            f"{key}: not supported; leave it out", param=key, code="unsupported_parameter"
        )
    if not any(value == neutral for neutral in _NEUTRAL[key]):
        allowed = " or ".join(["nothing", *map(json.dumps, _NEUTRAL[key])])
        raise ApiError(
            f"{key}: found {_shown(value)}, expected {allowed}: what is trained on is drawn from "
            "the policy as it is, one choice at a time",
            param=key,
            code="unsupported_value",
        )


def _check_sampling(given: JsonObject, sampling: Sampling) -> None:
    for key, own in (("temperature", sampling.temperature), ("top_p", sampling.top_p)):
        if key in given and given[key] != own:
            raise ApiError(
                f"{key}: found {_shown(given[key])}, expected {own:g}, the run's: tokens drawn in "
                "another way have other log-probs than the trainer computes; leave it out",
                param=key,
                code="unsupported_value",
            )


def _count(given: JsonObject, key: str) -> int:
    value = given[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ApiError(f"{key}: found {_shown(value)}, expected a whole number >= 1", param=key)
    return value


def _typed(given: JsonObject, key: str, kind: type, default: Any) -> Any:
    value = given.get(key, default)
    if not isinstance(value, kind):
        raise ApiError(f"{key}: found {_shown(value)}, expected {kind.__name__}", param=key)
    return value


def _tools(tools: Any) -> str:
    if not isinstance(tools, list):
        raise ApiError(f"tools: found {_shown(tools)}, expected a list", param="tools")
    for index, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type") == "function"
        function = tool.get("function") if is_function else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            where = f"tools[{index}]"
            raise ApiError(f"{where}: expected a function with a name", param=where)
    return json.dumps(tools) if tools else ""  # in the order in which the template writes them


# ---- messages ----------------------------------------------------------------------------------

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


def _messages(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages: expected a list with at least one", param="messages")
    return tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages))


def _message(message: Any, where: str) -> Message:
    """The message in the one form that chat templates take and in which messages are compared."""
    if not isinstance(message, dict) or message.get("role") not in [*_ROLES]:
        raise ApiError(f"{where}: expected a role, one of {', '.join(_ROLES)}", param=where)
    role = _ROLES[message["role"]]
    made: JsonObject = {"role": role, "content": _content(message.get("content"), where)}
    if role == "assistant":
        made["content"] = made["content"].strip()  # clients trim; the tokens stay as they were
        if message.get("tool_calls"):
            made["tool_calls"] = _tool_calls(message["tool_calls"], where)
    for key in ("name", "tool_call_id"):
        if isinstance(message.get(key), str):
            made[key] = _text(message[key], where)
    return made


def _content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if any(part.get("type") != "text" for part in content):
            raise ApiError(f"{where}: models are text only", param=where)
        return "".join(_text(part.get("text", ""), where) for part in content)
    return _text(content, where)


def _text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ApiError(f"{where}: found {_shown(text)}, expected text", param=where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(f"{where}: no Unicode text ({error.reason})", param=where) from None
    return text


def _tool_calls(calls: Any, where: str) -> list[JsonObject]:
    try:
        functions = [call["function"] for call in calls]
        made = [(str(call["id"]), str(f["name"])) for call, f in zip(calls, functions, strict=True)]
        arguments = [_arguments(f["arguments"]) for f in functions]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ApiError(
            f"{where}: expected tool_calls with an id and a function, its arguments as JSON",
            param=where,
        ) from None
    return [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": given}}
        for (id_, name), given in zip(made, arguments, strict=True)
    ]


def _arguments(given: Any) -> JsonObject:
    """An object: chat templates write it as JSON themselves."""
    value = read_strict(given) if isinstance(given, str) else given
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _shown(value: Any) -> str:
    return shortened(json.dumps(value), 80)


# ---- answers -----------------------------------------------------------------------------------


def completion_body(request: ChatRequest, answer: Answer, created: int) -> JsonObject:
    """The whole answer as one object."""
    choice = {"message": _written(answer.message), "finish_reason": answer.finish_reason}
    head = _head(request, answer, created, "chat.completion")
    return {**head, "choices": [_choice(request, answer, choice)], "usage": answer.usage}


def chunks(request: ChatRequest, answer: Answer, created: int) -> list[JsonObject]:
    """The same as events of a stream: the turn, its end, and the usage where it is wanted."""
    head = _head(request, answer, created, "chat.completion.chunk")
    delta = _written(answer.message)
    for index, call in enumerate(delta.get("tool_calls", ())):
        call["index"] = index
    said = _choice(request, answer, {"delta": delta, "finish_reason": None})
    ended = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": answer.finish_reason}
    usage = [{**head, "choices": [], "usage": answer.usage}] if request.include_usage else []
    return [{**head, "choices": [said]}, {**head, "choices": [ended]}, *usage]


def as_client(message: Message) -> Message:
    """The message as it comes back in a later request."""
    return _message(_written(message), "answer")


def _head(request: ChatRequest, answer: Answer, created: int, kind: str) -> JsonObject:
    return {"id": answer.id, "object": kind, "created": created, "model": request.model}


def _choice(request: ChatRequest, answer: Answer, rest: JsonObject) -> JsonObject:
    content = [_token(text, logprob) for text, logprob in answer.tokens]
    logprobs = {"content": content, "refusal": None} if request.logprobs else None
    return {"index": 0, **rest, "logprobs": logprobs}


def _token(text: str, logprob: float) -> JsonObject:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _written(message: Message) -> JsonObject:
    """Copy of a message whose calls have their arguments as text, as the protocol has them."""
    written = {**message, "content": message["content"] or None}
    if "tool_calls" in message:
        written["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _as_text(call["function"])}}
            for call in message["tool_calls"]
        ]
    else:
        written["content"] = message["content"]
    return written


def _as_text(function: JsonObject) -> str:
    text = json.dumps(function["arguments"], ensure_ascii=False)
    # Half of a surrogate pair stays an escape: a client could not send it back otherwise.
    return text if is_text(text) else json.dumps(function["arguments"])
