"""Schemas of nodes: inputs, outputs, and what a node returns. Only what can be read of them is here; no execution.

Each type below `ComfyTypeIO` has an `Input` and an `Output` class of its own, which know the type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar


class ControlAfterGenerate(str, Enum):
    """What a seed's widget does after each run."""

    fixed = "fixed"
    randomize = "randomize"


class Input:
    """A socket of a node."""

    Parent: ClassVar[Any] = None

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        extra_dict: dict[str, Any] | None = None,
        raw_link: bool | None = None,
        advanced: bool | None = None,
    ):
        self.id = id
        self.display_name = display_name
        self.optional = optional
        self.tooltip = tooltip

    def get_io_type(self) -> str:
        io_type: str = self.Parent.io_type
        return io_type

    def get_all(self) -> list[Input]:
        return [self]


class WidgetInput(Input):
    """A socket that is also a widget."""

    def __init__(
        self,
        id: str,
        display_name: str | None = None,
        optional: bool = False,
        tooltip: str | None = None,
        lazy: bool | None = None,
        default: Any = None,
        socketless: bool | None = None,
        widget_type: str | None = None,
        force_input: bool | None = None,
        extra_dict: dict[str, Any] | None = None,
        raw_link: bool | None = None,
        advanced: bool | None = None,
    ):
        super().__init__(id, display_name, optional, tooltip, lazy, extra_dict, raw_link, advanced)
        self.default = default


class DynamicInput(Input, ABC):
    """An input that stands for several."""


class Output:
    """A result of a node."""

    Parent: ClassVar[Any] = None

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ):
        self.id = id
        self.display_name = display_name or id
        self.tooltip = tooltip

    def get_io_type(self) -> str:
        io_type: str = self.Parent.io_type
        return io_type


class ComfyTypeI:
    """A type of inputs."""

    io_type: ClassVar[str] = ""

    class Input(Input): ...

    def __init_subclass__(cls, io_type: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.io_type = io_type
        for name in ("Input", "Output"):
            if hasattr(cls, name):
                setattr(cls, name, type(name, (getattr(cls, name),), {"Parent": cls}))


class ComfyTypeIO(ComfyTypeI):
    """A type of inputs and outputs."""

    class Output(Output): ...


def Custom(io_type: str) -> type[ComfyTypeIO]:
    """A type of one's own."""
    return type("CustomComfyType", (ComfyTypeIO,), {}, io_type=io_type)


class Boolean(ComfyTypeIO, io_type="BOOLEAN"):
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: bool | None = None,
            label_on: str | None = None,
            label_off: str | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, default)


class Int(ComfyTypeIO, io_type="INT"):
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: int | None = None,
            min: int | None = None,
            max: int | None = None,
            step: int | None = None,
            control_after_generate: bool | ControlAfterGenerate | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, default)
            self.min = min
            self.max = max
            self.step = step
            self.control_after_generate = control_after_generate


class Float(ComfyTypeIO, io_type="FLOAT"):
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: float | None = None,
            min: float | None = None,
            max: float | None = None,
            step: float | None = None,
            round: float | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, default)
            self.min = min
            self.max = max
            self.step = step
            self.round = round


class String(ComfyTypeIO, io_type="STRING"):
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            multiline: bool = False,
            placeholder: str | None = None,
            default: str | None = None,
            dynamic_prompts: bool | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, default)
            self.multiline = multiline


class Combo(ComfyTypeIO, io_type="COMBO"):
    class Input(WidgetInput):
        def __init__(
            self,
            id: str,
            options: Sequence[str] | None = None,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            default: str | None = None,
            control_after_generate: bool | ControlAfterGenerate | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, default)
            self.options = options


class Image(ComfyTypeIO, io_type="IMAGE"):
    """float32 [frames, height, width, channels] in 0 ... 1."""


class Latent(ComfyTypeIO, io_type="LATENT"):
    """{"samples": [batch, channels, ...]}."""


class Conditioning(ComfyTypeIO, io_type="CONDITIONING"):
    """[[embedding [1, tokens, channels], {...}], ...]."""


class Sigmas(ComfyTypeIO, io_type="SIGMAS"):
    """float32 [steps + 1]."""


class Model(ComfyTypeIO, io_type="MODEL"):
    """A ModelPatcher."""


class Autogrow(ComfyTypeI, io_type="COMFY_AUTOGROW_V3"):
    """Inputs that appear as others are connected; `execute` gets a dict of the connected ones."""

    class TemplatePrefix:
        """min to max inputs like `input`, called prefix0, prefix1, ..."""

        def __init__(self, input: Input, prefix: str, min: int = 1, max: int = 10):
            self.input = input
            self.prefix = prefix
            self.min = min
            self.max = max
            self.names = [f"{prefix}{index}" for index in range(max)]

    class Input(DynamicInput):
        def __init__(
            self,
            id: str,
            template: Autogrow.TemplatePrefix,
            display_name: str | None = None,
            optional: bool = False,
            tooltip: str | None = None,
            lazy: bool | None = None,
            extra_dict: dict[str, Any] | None = None,
        ):
            super().__init__(id, display_name, optional, tooltip, lazy, extra_dict)
            self.template = template


class Hidden(str, Enum):
    """What a node may ask to know."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"


class HiddenHolder:
    """What a node has asked to know; None for everything else."""

    def __init__(
        self,
        unique_id: str | None,
        prompt: Any,
        extra_pnginfo: Any,
        dynprompt: Any,
        auth_token_comfy_org: str | None,
        api_key_comfy_org: str | None,
    ):
        self.unique_id = unique_id
        self.prompt = prompt

    def __getattr__(self, key: str) -> Any:
        return None

    @classmethod
    def from_dict(cls, d: Mapping[Any, Any] | None) -> HiddenHolder:
        known = d or {}
        return cls(known.get(Hidden.unique_id), known.get(Hidden.prompt), None, None, None, None)


@dataclass
class Schema:
    """All that a node says of itself."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_output_node: bool = False
    has_intermediate_output: bool = False

    def validate(self) -> None:
        """Raise ValueError where two inputs, or two outputs that have ids, have the same one."""
        for ids in ([i.id for i in self.inputs], [o.id for o in self.outputs if o.id is not None]):
            if len(set(ids)) != len(ids):
                raise ValueError(f"ids must be unique: {ids}")


class NodeOutput:
    """What a node returns: its results, and what the front end is to show."""

    def __init__(
        self, *args: Any, ui: Any = None, expand: dict[str, Any] | None = None, block_execution: str | None = None
    ):
        self.args = args
        self.ui = ui

    @property
    def result(self) -> tuple[Any, ...] | None:
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


class ComfyNode(ABC):
    """A node: only class methods, called on a copy of the class that knows what is hidden from the graph."""

    hidden: ClassVar[Any] = None

    @classmethod
    @abstractmethod
    def define_schema(cls) -> Schema: ...

    if TYPE_CHECKING:  # a node has arguments of its own
        execute: ClassVar[Any]
        fingerprint_inputs: ClassVar[Any]
    else:

        @classmethod
        @abstractmethod
        def execute(cls, **kwargs: Any) -> NodeOutput: ...

        @classmethod
        def fingerprint_inputs(cls, **kwargs: Any) -> Any:
            """The same value as in the last run: nothing has changed."""
            raise NotImplementedError

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        schema = cls.define_schema()
        schema.validate()
        return schema

    @classmethod
    def PREPARE_CLASS_CLONE(cls, v3_data: Mapping[str, Any] | None) -> type[ComfyNode]:
        hidden = HiddenHolder.from_dict(v3_data["hidden_inputs"] if v3_data else None)
        return type(cls.__name__, (cls,), {"hidden": hidden})
