"""What alembic runs to migrate: on the connection, and in the transaction, of `upgrade`."""

from alembic import context

attributes = context.config.attributes
context.configure(connection=attributes["connection"], target_metadata=attributes["metadata"])
context.run_migrations()
