"""Modules that a rewriting adds to a user's graph, under names that the model has not taken itself."""

from torch import fx, nn


def free_name(module: nn.Module, name: str) -> str:
    """`name`, with a `_` behind it for as long as the module has that already."""
    return name if not hasattr(module, name) else free_name(module, f"{name}_")


def call_ahead(module: fx.GraphModule, name: str, called: nn.Module) -> None:
    """Add `called` under that name, and call it with the images ahead of everything else."""
    name = free_name(module, name)
    module.add_module(name, called)
    image = next(node for node in module.graph.nodes if node.op == "placeholder")
    with module.graph.inserting_after(image):
        module.graph.call_module(name, (image,))
    module.recompile()
