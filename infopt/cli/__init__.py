"""The command line. Each command's file parses, calls its use case and turns the outcome into an exit code.

Importing this costs typer and nothing heavier: commands import their use case when they run.
"""

from __future__ import annotations

import typer

from infopt.cli.bench import bench
from infopt.cli.compare import compare
from infopt.cli.data import app as data
from infopt.cli.demo import demo
from infopt.cli.doctor import doctor
from infopt.cli.env import app as env
from infopt.cli.export import export
from infopt.cli.generate import generate
from infopt.cli.inspect import inspect
from infopt.cli.models import app as models
from infopt.cli.optimize import optimize
from infopt.cli.recipes import app as recipes
from infopt.cli.results import app as results
from infopt.cli.shell import Shell, version

app = typer.Typer(
    cls=Shell,
    name="infopt",
    help="Make a language model cheaper to run, and prove it: one model, one recipe, one verdict.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.callback()(version)
for command in (demo, optimize, bench, compare, inspect, generate, export, doctor):
    app.command()(command)
for name, group in (("data", data), ("env", env), ("models", models), ("recipes", recipes), ("results", results)):
    app.add_typer(group, name=name)


def main() -> None:
    """The `infopt` program."""
    app()
