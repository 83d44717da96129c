"""`murmur coordinator …`: run the coordinator; admit clients and people; keep copies."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from murmur.output import err, out, print_json, print_table, told

coordinator = typer.Typer(
    help="Run the coordinator; admit clients and people.", no_args_is_help=True, suggest_commands=False
)

Data = Annotated[Path | None, typer.Option("--data", help="data folder of a coordinator on this machine")]
Json = Annotated[bool, typer.Option("--json", help="one line of JSON instead of a table")]


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
def add_user(
    name: str,
    role: Annotated[str, typer.Option(help="admin or viewer")] = "viewer",
    data: Data = None,
) -> None:
    """Add a person who logs in with a password, or change one; asks for the password."""
    if role not in ("admin", "viewer"):
        raise typer.BadParameter("admin or viewer", param_hint="--role")
    password = typer.prompt("password", hide_input=True, confirmation_prompt=True)
    with told(), _people(data) as people:
        people.add(name, role, password)
    out.print(f"{name} may log in as {role}")


@coordinator.command("token")
def make_token(
    name: Annotated[str, typer.Argument(help="account that the token acts as")] = "admin",
    days: Annotated[float, typer.Option(min=0.01)] = 90,
    data: Data = None,
) -> None:
    """Make an API token, for MURMUR_TOKEN; it is printed once."""
    with told(), _people(data) as people:
        token = people.api_token(name, lifetime_s=days * 86_400)
    sys.stdout.write(token + "\n")


@coordinator.command("login")
def login_link(
    data: Data = None,
) -> None:
    """Print a new one-time login link for the dashboard."""
    from murmur.client import find_access

    with told(), _people(data) as people:
        url = find_access(data).url
        out.print(f"{url}/login?link={people.link('admin')}", soft_wrap=True)


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


def _people(data: Path | None) -> Any:
    from murmur.accounts import people_of

    return people_of(data)
