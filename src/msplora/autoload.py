"""Register the tuner the moment PEFT is there, without importing PEFT ourselves."""


def install() -> None:
    """Filled in with the tuner."""
