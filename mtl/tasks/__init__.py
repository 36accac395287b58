"""Tasks: what they are, how their rows are read, and how they become text and tokens."""

from mtl.tasks.formats import Conversation, Example, Message, Text
from mtl.tasks.rendering import Renderer
from mtl.tasks.task import Task, check_task_names

__all__ = ["Conversation", "Example", "Message", "Renderer", "Task", "Text", "check_task_names"]
