"""Writes messages as chat templates take them, and probes for what a template supports."""

from qlora_trainer.data.examples.example import Conversation, Message, ToolCall

# The names that templates have for the reasoning before an answer: Qwen3's and DeepSeek's, others, gpt-oss's.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_PROBE = Conversation((Message("user", "question"), Message("assistant", "answer", reasoning="probethought")))
# A word that no template writes by itself.
CONTENT_PROBE = Conversation((Message("user", "probecontent"),))
CLOSING_PROBE = Conversation((Message("user", "a"),))
SYSTEM_PROBE = Conversation(
    (Message("system", "probesystem"), Message("user", "question"), Message("assistant", "answer"))
)
# Words that no template writes by itself. Mistral's template wants ids of nine letters and digits.
TOOL_PROBE_PARTS = ("probetool", "probecall", "probekey", "probevalue", "proberesult")
TOOL_PROBE = Conversation(
    (
        Message("user", "question"),
        Message("assistant", "", (ToolCall("probecall", {"probekey": "probevalue"}, "probeid12"),)),
        Message("tool", "proberesult", name="probecall", tool_call_id="probeid12"),
        Message("assistant", "answer"),
    ),
    (
        {
            "type": "function",
            "function": {
                "name": "probetool",
                "description": "None",
                "parameters": {"type": "object", "properties": {}},
            },
        },
    ),
)


def template_message(message: Message, *, in_parts: bool, reasoning_key: str | None = None) -> dict[str, object]:
    """The message as a chat template gets it, without keys that are not set."""
    content = [{"type": "text", "text": message.content}] if in_parts else message.content
    turn: dict[str, object] = {"role": message.role, "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    if message.reasoning is not None and reasoning_key is not None:
        turn[reasoning_key] = message.reasoning
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _tool_call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": dict(call.arguments)}
    return {"type": "function", "function": function, **({} if call.id is None else {"id": call.id})}
