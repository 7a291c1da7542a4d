"""Builds one graph in ComfyUI's two formats: the workflow its front end opens, and the prompt its server runs."""

import re
import textwrap
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.comfyui.object_info import recorded

TITLE, SLOT, WIDGET, GAP, PADDING = 30, 20, 24, 24, 10  # pixels of the front end's nodes and groups
GROUP_TITLE = 40
MULTILINE = 110
# What a node shows below its widgets, in pixels: a player, a chart, a panel.
EXTRA = {
    "SaveVideo": 300, "PreviewImage": 240, "LoadImage": 280, "QVDQuantizeModel": 60, "QVDLoadDiffusionModel": 60,
    "QVDCalibrate": 260, "QVDCalibrateTwoExperts": 260, "QVDReport": 320, "QVDCompare": 360, "QVDSaveCheckpoint": 40,
    "QVDSaveScales": 40, "QVDLoadScales": 40,
}  # fmt: skip
OPTIONAL_SHAPE, MUTED = 7, 2
COLORS = {"green": ("#232", "#353"), "red": ("#322", "#533"), "blue": ("#223", "#335")}


@dataclass
class Node:
    """One node of a graph; `node[0]` is its first output."""

    id: int
    kind: str
    values: dict[str, Any]  # a widget's value, or an output of another node
    title: str = ""
    color: str = ""
    muted: bool = False
    position: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    properties: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, slot: int) -> tuple["Node", int]:
        return self, slot


class Workflow:
    """A graph that grows column by column, group by group, top to bottom."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info = recorded()
        self.nodes: list[Node] = []
        self.groups: list[dict[str, Any]] = []
        self._x = self._y = self._width = self._next_x = 0

    def column(self, width: int) -> None:
        """Start a column of nodes of that width, right of all there is."""
        self._x, self._y, self._width = self._next_x, 0, width
        self._next_x += width + 2 * PADDING + 40

    @contextmanager
    def group(self, title: str, color: str = "#3f789e") -> Iterator[None]:
        """What is added within stands in a titled frame."""
        top = self._y
        self._y += GROUP_TITLE
        yield
        bounding = [self._x - PADDING, top, self._width + 2 * PADDING, self._y - top - GAP + PADDING]
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": bounding,
                "color": color,
                "font_size": 22,
                "flags": {},
            }
        )
        self._y += GROUP_TITLE - GAP

    def _place(self, node: Node, height: int) -> Node:
        node.position, node.size = (self._x, self._y + TITLE), (self._width, height)
        self._y += TITLE + height + GAP
        self.nodes.append(node)
        return node

    def node(self, kind: str, *, title: str = "", color: str = "", muted: bool = False, **values: Any) -> Node:
        """Add a node; a value is an output of another (`node[0]`), a list of them (where it grows), or a widget's."""
        spec = self.info[kind]["inputs"]
        whole: dict[str, Any] = {}
        for name, entry in spec.items():
            given = values.pop(name.replace(".", "_"), entry.get("default") if entry.get("widget") else None)
            if entry.get("grows"):
                whole |= {f"{name}.{entry['prefix']}{index}": output for index, output in enumerate(given)}
            elif given is not None:
                whole[name] = given
            elif entry.get("widget") or entry["required"]:
                raise ValueError(f"{kind} needs a value for {name}")
        if values:
            raise ValueError(f"{kind} has no input {', '.join(values)}")
        node = Node(len(self.nodes) + 1, kind, whole, title, color, muted)
        sockets = len(self._sockets(node))
        lines = sum(self._lines(kind, name) for name in whole if not isinstance(whole[name], tuple))
        height = max(sockets, len(self.info[kind]["outputs"])) * SLOT + lines + EXTRA.get(kind, 0) + 16
        return self._place(node, height)

    def note(self, text: str, height: int) -> None:
        """Add a note in Markdown, each paragraph of `text` on one line: the front end keeps line breaks."""
        lines = re.sub(r"(\S)\n(?!\n|- |\d+\. )", r"\1 ", textwrap.dedent(text).strip())
        node = Node(len(self.nodes) + 1, "MarkdownNote", {"text": lines}, "About this workflow", "blue")
        self._place(node, height)

    def models(self, node: Node, *files: tuple[str, str, str]) -> Node:
        """Let the front end offer to download (name, folder, address) where a file is missing."""
        node.properties["models"] = [{"name": name, "url": url, "directory": folder} for name, folder, url in files]
        return node

    def _lines(self, kind: str, name: str) -> int:
        entry = self.info[kind]["inputs"][name]
        extra = WIDGET if entry.get("control_after_generate") or entry.get("image_upload") else 0
        return (MULTILINE if entry.get("multiline") else WIDGET) + extra

    def _sockets(self, node: Node) -> list[dict[str, Any]]:
        """The input sockets of a node; one that grows ends with an empty one, as in the front end."""
        sockets: list[dict[str, Any]] = []
        for name, entry in self.info.get(node.kind, {"inputs": {}})["inputs"].items():
            shape = {} if entry["required"] else {"shape": OPTIONAL_SHAPE}
            if entry.get("grows"):
                count = sum(key.startswith(f"{name}.") for key in node.values)
                for index in range(min(count + 1, entry["max"])):
                    short = f"{entry['prefix']}{index}"
                    optional = {} if index < entry["min"] else {"shape": OPTIONAL_SHAPE}
                    sockets.append({"label": short, "name": f"{name}.{short}", "type": entry["type"], **optional})
            elif not entry.get("widget"):
                sockets.append({"name": name, "type": entry["type"], **shape})
            elif isinstance(node.values.get(name), tuple):
                sockets.append({"name": name, "type": entry["type"], "widget": {"name": name}, **shape})
        return sockets

    def _widget_values(self, node: Node) -> list[Any]:
        if node.kind == "MarkdownNote":
            return [node.values["text"]]
        values: list[Any] = []
        for name, entry in self.info[node.kind]["inputs"].items():
            if entry.get("widget"):
                value = node.values.get(name)
                values.append(entry.get("default") if isinstance(value, tuple) else value)
                values += ["fixed"] if entry.get("control_after_generate") else []
                values += ["image"] if entry.get("image_upload") else []
        return values

    def ui(self) -> dict[str, Any]:
        """The workflow as the front end saves it."""
        links: list[list[Any]] = []
        inputs = {node.id: self._sockets(node) for node in self.nodes}
        leaving: dict[tuple[int, int], list[int]] = {}
        for node in self.nodes:
            for slot, socket in enumerate(inputs[node.id]):
                value = node.values.get(socket["name"])
                socket["link"] = None
                if isinstance(value, tuple):
                    socket["link"] = len(links) + 1
                    links.append([socket["link"], value[0].id, value[1], node.id, slot, socket["type"]])
                    leaving.setdefault((value[0].id, value[1]), []).append(socket["link"])
        nodes = []
        for order, node in enumerate(self.nodes):
            outputs = [
                {"name": name, "type": kind, "links": leaving.get((node.id, slot))}
                for slot, (name, kind) in enumerate(self.info.get(node.kind, {"outputs": []})["outputs"])
            ]
            pack = (
                {}
                if node.kind == "MarkdownNote"
                else {"cnr_id": "qvd" if node.kind.startswith("QVD") else "comfy-core"}
            )
            properties = {} if not pack else {"Node name for S&R": node.kind, **pack, **node.properties}
            looks = dict(zip(("color", "bgcolor"), COLORS[node.color], strict=True)) if node.color else {}
            named = {"title": node.title} if node.title else {}
            nodes.append(
                {
                    "id": node.id, "type": node.kind, **named, "pos": list(node.position), "size": list(node.size),
                    "flags": {}, "order": order, "mode": MUTED if node.muted else 0, "inputs": inputs[node.id],
                    "outputs": outputs, "properties": properties, "widgets_values": self._widget_values(node), **looks,
                }
            )  # fmt: skip
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, self.name)), "revision": 0, "last_node_id": len(self.nodes),
            "last_link_id": len(links), "nodes": nodes, "links": links, "groups": self.groups, "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [60, 60]}}, "version": 0.4,
        }  # fmt: skip

    def api(self) -> dict[str, Any]:
        """The prompt of the same graph; a muted node says so in `_meta`."""
        prompt = {}
        for node in self.nodes:
            if node.kind != "MarkdownNote":
                inputs = {
                    name: [str(value[0].id), value[1]] if isinstance(value, tuple) else value
                    for name, value in node.values.items()
                }
                meta: dict[str, Any] = {"title": node.title or self.info[node.kind]["display_name"]}
                meta |= {"muted": True} if node.muted else {}
                prompt[str(node.id)] = {"class_type": node.kind, "inputs": inputs, "_meta": meta}
        return prompt
