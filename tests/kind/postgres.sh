#!/bin/sh
# Begin with an empty database `students`, whose owner `students` has the password in PGPASSWORD.
set -eu
echo "$PGPASSWORD" > /tmp/password
[ -d /data/pg ] || initdb --pgdata=/data/pg --username=students --pwfile=/tmp/password --auth=scram-sha-256 --encoding=UTF8
grep -q 0.0.0.0 /data/pg/pg_hba.conf || echo 'host all all 0.0.0.0/0 scram-sha-256' >> /data/pg/pg_hba.conf
(until createdb --host=/tmp --username=students students 2>/dev/null; do sleep 0.2; done) &
exec postgres -D /data/pg -c listen_addresses='*' -c unix_socket_directories=/tmp
