"""The revisions of the database, and how it is brought to the newest: at every start of an instance.

A change of the table in `store` is one more file in versions/; a test compares what the two make.
"""

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData

logging.getLogger("alembic").setLevel(logging.WARNING)  # what it says of itself at each start tells nobody anything

ALONE = {
    # Both end with the transaction. SQLite's own lock is taken before the first look, not only before the first write.
    "sqlite": ("BEGIN IMMEDIATE",),
    "postgresql": ("SET LOCAL statement_timeout = '10min'", "SELECT pg_advisory_xact_lock(7373656474756473)"),
}
"""What lets one of the instances that start at once migrate, and the others wait for it."""


class UnknownRevisionError(Exception):
    """The database is of a revision that this code does not know."""


def upgrade(connection: Connection, metadata: MetaData) -> tuple[str | None, str | None]:
    """Bring a database to the newest revision, in the transaction of `connection`; return the one before, and this.

    Raises `UnknownRevisionError`.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes.update(connection=connection, metadata=metadata)
    script = ScriptDirectory.from_config(config)
    after, known = script.get_current_head(), {each.revision for each in script.walk_revisions()}
    for statement in ALONE[connection.dialect.name]:  # only now: while they hold, no other instance stores anything
        connection.exec_driver_sql(statement)
    before = MigrationContext.configure(connection).get_current_revision()
    if before and before not in known:
        raise UnknownRevisionError(
            f"is of revision {before}, and this code knows none after {after}: a newer version has migrated it; run "
            f"that version, or restore a backup from before"
        )
    if before != after:
        command.upgrade(config, "head")
    return before, after
