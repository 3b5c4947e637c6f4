"""CUDA graphs: a training step's two thousand small kernels, recorded once and then started together. Started one by
one, they cost the CPU more time than a large GPU needs to run them.
"""
import torch

from support.parallel import RANKS

WARM_UP = 5  # calls in which torch.compile compiles, cuDNN chooses its kernels and optimizers make their states


def replayed(device, compile, scaler):
    """A decorator: the function's kernels are replayed from a CUDA graph where that is possible: not with
    --compile=false, nor where a GradScaler looks at the gradients, nor where processes exchange them."""
    possible = device.type == "cuda" and compile.lower() != "false" and not scaler.is_enabled() and RANKS == 1
    return Replayed if possible else lambda function: function


class Replayed:
    """A function of tensors and numbers that changes weights in place. No number in it may depend on a tensor's value
    or on how often it was called, and what it returns is overwritten by the next call.

    Calls with other shapes are recorded anew. Where recording fails one line says why, and it is called as it is.
    """
    def __init__(self, function):
        self.function, self.stream = function, torch.cuda.Stream()
        self.shapes, self.calls, self.graph, self.failed = None, 0, None, False

    def __call__(self, *inputs):
        shapes = [x.shape if torch.is_tensor(x) else () for x in inputs]
        if shapes != self.shapes:  # at first there are no old fakes; D may begin later
            self.shapes, self.calls, self.graph = shapes, 0, None
        self.calls += 1
        if self.calls > WARM_UP and not self.graph and not self.failed:
            self.record(inputs)
        if not self.graph:
            return self.call(inputs)
        for place, x in zip(self.inputs, inputs):
            place.copy_(x) if torch.is_tensor(x) else place.fill_(x)
        self.graph.replay()
        return self.outputs

    def call(self, inputs):
        """On the stream on which it will be recorded, so that what autograd keeps of the weights belongs to it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def record(self, inputs):
        """Computes nothing yet. Threads that read images go on pinning memory meanwhile."""
        self.inputs = [x.clone() if torch.is_tensor(x) else torch.zeros((), device=inputs[0].device) for x in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        except Exception as error:  # of a loss that looks at its value, for example
            self.failed = True
            print(f"machine   not recorded as a CUDA graph, which is slower: {' '.join(str(error).split())[:200]}")
