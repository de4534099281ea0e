import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """A `transformers.Trainer` leaves its own for the rest of the process, where `loop.fit` would find it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
