"""How an iteration is carried out: operation by operation from Python, or captured as a CUDA graph and replayed.

An iteration is a function without arguments and results. Whatever it reads and writes is a tensor that stays where it
is, so that what was done once on the device can be done again without Python: no launch is waited for, and nothing is
allocated.
"""

from collections.abc import Callable, Hashable

import torch

from gdfq import ranks
from gdfq.random_state import RandomState

# Iterations of a kind before its capture: gradients, optimizer state and the libraries' workspaces come into being in
# them, and libraries choose their algorithms.
WARMUP = 3


class CudaGraph:
    """What a function does on a device, captured once and replayed.

    Args:
        device: a CUDA device.
        random: the random state that the function draws from; replays move it on as calls would.
    """

    def __init__(self, device: torch.device, random: torch.Generator) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(random)

    @staticmethod
    def obstacle(device: torch.device) -> str | None:
        """Why there can be no graph on `device`, or None."""
        return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, and this run is on '{device}'"

    def warm_up(self, function: Callable[[], None]) -> None:
        """Call `function` on the stream that will be captured."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def capture(self, function: Callable[[], None]) -> None:
        """Note what `function` does without doing it. Raises what CUDA or PyTorch has against it."""
        with torch.cuda.graph(self.graph, stream=self.stream):
            function()

    def replay(self) -> None:
        self.graph.replay()


class IterationRunner:
    """Runs iterations, as a CUDA graph where that is wanted and possible.

    Every kind of iteration has a graph of its own, until one of another kind comes. Its first iterations run eagerly;
    they are iterations like all others.

    Args:
        wanted: the setting `run.cuda_graph`: true, false or `auto`, where the device has them.
        device: of all tensors.
        random: the one source of random numbers in an iteration.
        obstacle: why an iteration of this run cannot be captured, or None.

    Attributes:
        description: `eager`, `graph` or, where a graph was wanted, `eager: ` and why it is none.
    """

    def __init__(
        self, wanted: bool | str, device: torch.device, random: RandomState, obstacle: str | None = None
    ) -> None:
        self.device = device
        self.random = random
        obstacle = CudaGraph.obstacle(device) or obstacle or ranks.obstacle()
        self.wanted = bool(wanted) and obstacle is None
        self.description = f"eager: {obstacle}" if wanted is True and obstacle else "eager"
        self.restart()

    def restart(self) -> None:
        """Forget what was captured: tensors have been exchanged."""
        self.kind: Hashable = None
        self.graph: CudaGraph | None = None
        self.warm_ups = 0
        self.captured = False

    def run(self, kind: Hashable, iteration: Callable[[], None]) -> None:
        """Carry out `iteration()`, which does the same every time that `kind` is the same."""
        if not self.wanted:
            iteration()
            return
        if self.graph is None or kind != self.kind:
            self.restart()
            self.kind, self.graph = kind, CudaGraph(self.device, self.random.generator)
        if self.warm_ups < WARMUP:
            self.warm_ups += 1
            self.graph.warm_up(iteration)
            return
        if not self.captured:
            self._capture(self.graph, iteration)
        if self.captured:
            self.graph.replay()
        else:
            iteration()

    def _capture(self, graph: CudaGraph, iteration: Callable[[], None]) -> None:
        random = self.random.generator.get_state()
        try:
            graph.capture(iteration)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            self.description = f"eager: the iteration cannot be captured as a CUDA graph: {reason}"
            self.wanted, self.graph = False, None
            self.random.restore(random)
        else:
            self.description, self.captured = "graph", True
