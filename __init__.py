"""QVD as a ComfyUI custom-node folder: a place holder.

ComfyUI imports this folder when the repository is cloned into `custom_nodes/`. **The node pack is not there yet**:
this module registers no nodes, so that ComfyUI starts cleanly and shows nothing. Until it comes, use QVD through
`qvd_diffusers`.
"""

NODE_CLASS_MAPPINGS: dict[str, type] = {}

__all__ = ["NODE_CLASS_MAPPINGS"]
