"""What a thread has switched on in torch, so that a step that breaks off does not leave it on for good."""

import torch

from minirksc.kernels.native.tape import drop_recording


class TorchModes:
    """The calling thread's modes as they are now."""

    __slots__ = ("_has_grad", "_is_inference", "_num_functions")

    def __init__(self) -> None:
        self._is_inference = torch.is_inference_mode_enabled()
        self._has_grad = torch.is_grad_enabled()
        self._num_functions = torch._C._len_torch_function_stack()

    def restore(self) -> None:
        """Makes them so again, in the thread that they were read in."""
        drop_recording()
        while torch._C._len_torch_function_stack() > self._num_functions:
            torch._C._pop_torch_function_stack()
        if torch.is_inference_mode_enabled() and not self._is_inference:
            # The guard that would have ended it was never asked to, and does nothing when it is collected.
            torch.inference_mode(False).__enter__()
            torch.set_grad_enabled(self._has_grad)
