from __future__ import annotations

import pytest
from typer.testing import CliRunner

from shoestring.cli import app


@pytest.fixture
def shoestring():
    """The command, called as a user does; the exit code is checked."""
    runner = CliRunner()

    def call(*arguments, code=0):
        result = runner.invoke(app, [str(a) for a in arguments])
        assert result.exit_code == code, result.output + (result.stderr or "")
        return result

    return call
