"""`murmur client …`: take part as an organization."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from murmur.consent import approve, deny, receipt, resume, site, stop
from murmur.coordinating import Json
from murmur.nodes import ranks
from murmur.options import pairs as _pairs
from murmur.options import values as _values
from murmur.output import out, print_json, told
from murmur.preparing import check, plan

client = typer.Typer(
    help="Take part as an organization, with data that stays where it is.", no_args_is_help=True, suggest_commands=False
)

Site = Annotated[Path, typer.Option("--dir", help="the agent's folder")]
HERE = Path("murmur-client")


@client.command()
def enroll(
    join: Annotated[str, typer.Argument(help="the join string of the invitation")],
    name: Annotated[str, typer.Option(help="the client's name, as the invitation was made for")],
    directory: Site = HERE,
    task: Annotated[list[str] | None, typer.Option(help="name=module:Class or name=file.py:Class, repeatable")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="task.key=value, repeatable")] = None,
    processes: Annotated[int, typer.Option(min=1, help="training processes of this client")] = 1,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="only replace the key of the client in this folder, which was revoked")
    ] = False,
    json_: Json = False,
) -> None:
    """Make this organization's key, enrol it, and write client.toml."""
    from murmur.enrolment import enroll_here

    with told():
        tasks, options = _pairs(task), _values(option)
        view = enroll_here(join, name, directory, tasks=tasks, options=options, processes=processes, new_key=new_key)
    if json_:
        return print_json(view)
    out.print(f"[bold]{view['client']}[/] is {view['state']}; the fingerprint of its key is")
    out.print(f"  [bold]{view['fingerprint']}[/]")
    out.print("Compare it with the one that the coordinator's admin sees, then: "
              f"murmur client join --dir {directory}", soft_wrap=True)  # fmt: skip


@client.command()
def join(
    directory: Site = HERE,
    flower: Annotated[
        list[str] | None,
        typer.Option(help="[task=]module:app, file.py:app or folder of a Flower ClientApp, beside client.toml's tasks"),
    ] = None,
    node_config: Annotated[
        list[str] | None, typer.Option(help="key=value in the Flower app's node_config, repeatable")
    ] = None,
    run_config: Annotated[
        list[str] | None, typer.Option(help="key=value in the Flower app's run_config, repeatable")
    ] = None,
) -> None:
    """Run the agent: take part in runs until it is stopped."""
    from murmur.clients.agent import main as run_agent
    from murmur.enrolment import flower_tasks

    with told():
        tasks = flower_tasks(flower or [], _values(node_config), _values(run_config))
        raise typer.Exit(run_agent(["--dir", str(directory)], tasks=tasks))


@client.command()
def ledger(
    directory: Site = HERE,
    json_: Json = False,
) -> None:
    """Show what each data set has spent on local differential privacy, over all runs."""
    from murmur.ledger import show_ledger

    with told():
        show_ledger(directory, as_json=json_)


for command in (site, stop, resume, approve, deny, receipt):
    client.command()(command)
client.command()(check)
client.command()(plan)
client.command()(ranks)


@client.command("policy")
def show_policy(directory: Site = HERE, json_: Json = False) -> None:
    """Show what this site takes part in, which no coordinator can change; client.toml's [policy] sets it."""
    from murmur.site import show_policy

    with told():
        show_policy(directory, as_json=json_)


@client.command("status")
def show_status(directory: Site = HERE, json_: Json = False) -> None:
    """Show whether this client is enrolled, approved and running, and what is installed; exit code 1 when it is not."""
    from murmur.site import show_status

    with told():
        code = show_status(directory, as_json=json_)
    raise typer.Exit(code)


@client.command("service")
def systemd_service(
    directory: Site = HERE,
    user: Annotated[str, typer.Option(help="who the agent runs as")] = "murmur-agent",
    data: Annotated[list[Path] | None, typer.Option(help="folder that it reads and never writes, repeatable")] = None,
) -> None:
    """Print a systemd unit that keeps this agent running; it belongs in /etc/systemd/system/murmur-agent.service."""
    from murmur.site import unit

    with told():
        sys.stdout.write(unit(directory.absolute(), user, tuple(path.absolute() for path in data or ())))
