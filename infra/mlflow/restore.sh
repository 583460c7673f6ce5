#!/usr/bin/env bash
# restore.sh FOLDER DATABASE_URI ARTIFACTS_URI: restore a backup into a database that contains nothing else.
set -euo pipefail
if [ "$#" -ne 3 ]; then
  echo "usage: $0 FOLDER DATABASE_URI ARTIFACTS_URI" >&2
  exit 2
fi
folder="$1" database="$2" artifacts="$3"
(cd "${folder}" && sha256sum --check --quiet --strict SHA256SUMS)
# Restore artifacts first, so that the database never refers to missing files.
python - "${folder}/artifacts" "${artifacts}" <<'PYTHON'
import sys
from pathlib import Path

from pyarrow import fs

target, path = fs.FileSystem.from_uri(sys.argv[2])
fs.copy_files(str(Path(sys.argv[1]).resolve()), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=target)
PYTHON
pg_restore --clean --if-exists --no-owner --single-transaction --exit-on-error --dbname="${database}" "${folder}/database.dump"
echo "restored from ${folder}"
