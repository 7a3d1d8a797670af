"""Which fused kernels a step used, read from the names of the operations that torch's profiler saw."""

from collections.abc import Iterable

__all__ = ["find_fast_paths"]

_KERNELS = {
    "aten::_scaled_dot_product_flash_attention": "flash attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash attention",
    "aten::_scaled_dot_product_efficient_attention": "memory-efficient attention",
    "aten::_scaled_dot_product_cudnn_attention": "cuDNN attention",
    "aten::_cudnn_rnn": "cuDNN RNN",
    "aten::mkldnn_rnn_layer": "oneDNN RNN",
    "aten::_thnn_fused_lstm_cell": "fused LSTM cell",
    "aten::_thnn_fused_gru_cell": "fused GRU cell",
    "aten::cudnn_convolution": "cuDNN convolution",
    "aten::mkldnn_convolution": "oneDNN convolution",
}


def find_fast_paths(operations: Iterable[str]) -> list[str]:
    """Name the fused kernels among the operations of a step.

    Returns:
        What was found, each once, in alphabetical order.

    Example:
        >>> find_fast_paths(["aten::addmm", "aten::_cudnn_rnn"])
        ['cuDNN RNN']
    """
    return sorted({_KERNELS[name] for name in operations if name in _KERNELS}, key=str.lower)
