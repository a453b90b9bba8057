"""Device resolution."""

import torch


def find_device(device: str | torch.device) -> torch.device:
    """Return the torch device of a name, for "auto" a GPU if there is one; ValueError if it is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N ({error})") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {str(device)!r}, expected auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', but torch finds no Apple GPU here: use device 'cpu'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch finds no CUDA device here: use device 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {str(device)!r}, expected an index below {torch.cuda.device_count()}")
    return device
