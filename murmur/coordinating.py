"""`murmur coordinator …`: run the coordinator; admit clients and people; keep copies."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from murmur.output import err, out, print_json, print_table, told

if TYPE_CHECKING:
    from murmur.coordinator.people import People
    from murmur.protocol.roles import Role

coordinator = typer.Typer(
    help="Run the coordinator; admit clients and people.", no_args_is_help=True, suggest_commands=False
)

Data = Annotated[Path | None, typer.Option("--data", help="data folder of a coordinator on this machine")]
Json = Annotated[bool, typer.Option("--json", help="one line of JSON instead of a table")]


@coordinator.command("init")
def found_coordinator(
    folder: Annotated[Path, typer.Argument(help="folder where the coordinator will be started")] = Path(),
) -> None:
    """Write a murmur.toml with every setting, and make the data folder; nothing is started or written over."""
    from murmur.founding import found

    with told():
        path, data = found(folder)
    out.print(f"[bold]{path}[/] has every setting at its default; take the # away from what you change", soft_wrap=True)
    there = "" if folder == Path() else f" in {folder}"
    out.print(f"`murmur coordinator serve`{there} starts it, with its data in {data}", soft_wrap=True)


@coordinator.command()
def serve(
    data: Annotated[Path | None, typer.Option(help="data folder \\[default: murmur-data]")] = None,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL \\[default: SQLite in the data folder]")] = None,
    blobs: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|S3",
            help="where models and updates lie: a folder, or s3://bucket/prefix with the extra s3 and AWS_… variables "
            "\\[default: blobs in the data folder]",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on \\[default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="port; 0 takes a free one \\[default: 8443]")] = None,
    public_host: Annotated[str | None, typer.Option(help="name that agents reach this machine by")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM chain, instead of our own CA's")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="key of --tls-cert")] = None,
    insecure_http: Annotated[bool | None, typer.Option("--insecure-http", help="no TLS; loopback only")] = None,
    json_: Json = False,
) -> None:
    """Start the coordinator; prints a one-time login link for the dashboard."""
    import logging

    from murmur.clients.logs import to_stderr
    from murmur.coordinator.serve import Address
    from murmur.coordinator.serve import serve as serve_until_stopped
    from murmur.coordinator.settings import Settings

    to_stderr(logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    given = {
        "data": data,
        "database": database,
        "blobs": blobs,
        "host": host,
        "port": port,
        "public_host": public_host,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "insecure_http": insecure_http,
    }

    def started(address: Address) -> None:
        if json_:
            print_json({"url": address.url, "login": address.login})
        else:
            out.print(f"coordinator at [bold]{address.url}[/]")
            out.print(f"log in once, within 15 minutes: [bold]{address.login}[/]", soft_wrap=True)

    with told():
        serve_until_stopped(Settings.read(**given), started=started)


@coordinator.command()
def invite(
    name: Annotated[str, typer.Argument(help="the client's name")], data: Data = None, json_: Json = False
) -> None:
    """Make a one-time invitation; the organization runs the line that is printed."""
    with told(), connected(data) as c:
        view = c.invite(name)
    if json_:
        print_json(view.model_dump(mode="json"))
    else:
        out.print(f"murmur client enroll '{view.join}' --name {name}", soft_wrap=True)
        err.print(f"[dim]for {name}, once, until {view.expires_at:%Y-%m-%d %H:%M} UTC[/]")


@coordinator.command("clients")
def list_clients(data: Data = None, json_: Json = False) -> None:
    """List clients with the fingerprints of their keys."""
    with told(), connected(data) as c:
        found = c.clients()
    if json_:
        return print_json([v.model_dump(mode="json") for v in found])
    rows = ((v.id, v.state, "online" if v.online else "away", v.seen_at, v.fingerprint) for v in found)
    print_table("Clients", ("client", "state", "", "seen", "fingerprint"), rows)


@coordinator.command()
def approve(name: str, data: Data = None) -> None:
    """Let a pending client take part, after comparing its key's fingerprint with the organization."""
    with told(), connected(data) as c:
        c.approve(name)
    out.print(f"{name} is active")


@coordinator.command()
def revoke(name: str, data: Data = None) -> None:
    """Refuse a client's key from now on."""
    with told(), connected(data) as c:
        c.revoke(name)
    out.print(f"{name} is revoked")


@coordinator.command("user")
def user(
    name: Annotated[str, typer.Argument(help="without a name: list all")] = "",
    role: Annotated[str, typer.Option(help="viewer, researcher or admin")] = "viewer",
    link: Annotated[bool, typer.Option("--link", help="no password: print a link that signs in once")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="remove it, with its sessions and tokens")] = False,
    data: Data = None,
    json_: Json = False,
) -> None:
    """Add a person who logs in with a password, or change one; asks for the password."""
    with told(), _people(data) as people:
        if not name:
            return _show([v.model_dump(mode="json") for v in people.all()], "Users", json_, hidden=())
        if remove:
            people.remove(name)
            return out.print(f"{name} is removed")
        wanted = _role(role)
        given = None if link else typer.prompt("password", hide_input=True, confirmation_prompt=True)
        people.add(name, wanted, given)
        if link:
            return out.print(_login_link(people, name, data), soft_wrap=True)
    out.print(f"{name} may log in as {role}")


@coordinator.command("token")
def token(
    name: Annotated[str, typer.Argument(help="account that the token acts as")] = "admin",
    days: Annotated[float, typer.Option(min=0.01)] = 90,
    role: Annotated[str, typer.Option(help="what it may: viewer, researcher or admin \\[default: its account's]")] = "",
    label: Annotated[str, typer.Option("--for", help="what it is for, shown in lists")] = "",
    list_: Annotated[bool, typer.Option("--list", help="list tokens and sessions instead")] = False,
    withdraw: Annotated[str, typer.Option(metavar="ID", help="take a token or session back instead")] = "",
    data: Data = None,
    json_: Json = False,
) -> None:
    """Make an API token, for MURMUR_TOKEN; it is printed once."""
    with told(), _people(data) as people:
        if list_:
            found = [v.model_dump(mode="json", exclude={"token"}) for v in people.credentials()]
            return _show(found, "Tokens and sessions", json_, hidden=("created_at",))
        if withdraw:
            people.withdraw(withdraw)
            return out.print(f"{withdraw} is worth nothing from now on")
        made = people.api_token(name, lifetime_s=days * 86_400, label=label, role=_role(role) if role else None)
    sys.stdout.write(made.token + "\n")


def _role(text: str) -> Role:
    from murmur.protocol.roles import ROLES

    if text not in ROLES:
        raise typer.BadParameter("viewer, researcher or admin", param_hint="--role")
    return text


def _show(rows: list[dict[str, Any]], title: str, as_json: bool, hidden: tuple[str, ...]) -> None:
    if as_json:
        return print_json(rows)
    names = [name for name in (rows[0] if rows else ()) if name not in hidden]
    print_table(title, names, ([row[name] for name in names] for row in rows))


def _login_link(people: People, name: str, data: Path | None) -> str:
    from murmur.client import find_access

    return f"{find_access(data).url}/login?link={people.link(name)}"


@coordinator.command("login")
def login_link(
    data: Data = None,
) -> None:
    """Print a new one-time login link for the dashboard."""
    with told(), _people(data) as people:
        out.print(_login_link(people, "admin", data), soft_wrap=True)


@coordinator.command("backup")
def back_up(to: Annotated[Path, typer.Argument(help="folder that is made")], data: Data = None) -> None:
    """Copy the database, the blobs and the CA of a coordinator, while it runs."""
    from murmur.coordinator.backup import backup
    from murmur.coordinator.settings import Settings

    with told():
        count = backup(Settings.read(data=data), to)
    out.print(f"{to} holds the database, the CA and {count} blobs; `murmur coordinator restore {to} --data …` uses it")


@coordinator.command("restore")
def restore_backup(source: Annotated[Path, typer.Argument(help="a backup's folder")], data: Data = None) -> None:
    """Make a data folder from a backup; start the coordinator on it to go on from there."""
    from murmur.coordinator.backup import restore
    from murmur.coordinator.settings import Settings

    with told():
        settings = Settings.read(data=data)
        restore(source, settings)
    out.print(f"restored; `murmur coordinator serve --data {settings.data}` goes on from there")


@coordinator.command("migrate")
def migrate_database(data: Data = None) -> None:
    """Bring the database to this release's schema without starting the coordinator; `serve` does it too."""
    from murmur.accounts import migrated

    with told():
        before, after = migrated(data)
    out.print(f"the database is at {after}" + (", as it was" if before == after else f"; it was at {before or 'none'}"))


@coordinator.command()
def openapi() -> None:
    """Print the API's OpenAPI document, for programs in other languages."""
    typer.echo(openapi_document(), nl=False)


def openapi_document() -> str:
    """The document as docs/openapi.json holds it."""
    import json
    from tempfile import TemporaryDirectory

    from murmur.coordinator.app import create_app
    from murmur.coordinator.settings import Settings

    with TemporaryDirectory() as folder:
        app = create_app(Settings(data=Path(folder), database="", blobs="", insecure_http=True))
        document = app.openapi()
        app.state.parts.store.close()
    return json.dumps(document, indent=1) + "\n"


def connected(data: Path | None) -> Any:
    """The coordinator that the options or the environment name."""
    from murmur.client import Client, find_access

    return Client(find_access(data))


def _people(data: Path | None) -> AbstractContextManager[People]:
    from murmur.accounts import people_of

    return people_of(data)
