"""search: a space of programs or architectures -> the best of them, ranked."""

from shoestring.search.programs import Program, ProgramSearch, program_to_optimizer

__all__ = ["Program", "ProgramSearch", "program_to_optimizer"]
