#!/usr/bin/env bash
# backup.sh DATABASE_URI ARTIFACTS_URI FOLDER: copy MLflow's database and artifacts into a new folder.
set -euo pipefail
if [ "$#" -ne 3 ]; then
  echo "usage: $0 DATABASE_URI ARTIFACTS_URI FOLDER" >&2
  exit 2
fi
database="$1" artifacts="$2" folder="$3"
if [ -e "${folder}" ]; then
  echo "${folder} is there already; a backup goes into a new folder" >&2
  exit 2
fi
umask 077 # the dump holds the digests of passwords
part="${folder}.part"
rm -rf "${part}"
mkdir -p "${part}/artifacts"
pg_dump --format=custom --no-owner --file="${part}/database.dump" "${database}"
python - "${artifacts}" "${part}/artifacts" <<'PYTHON'
import sys
from pathlib import Path, PurePosixPath

from pyarrow import fs

source, path = fs.FileSystem.from_uri(sys.argv[1])
folder, bucket = source.get_file_info([path, str(PurePosixPath(path).parent)])
if folder.type == fs.FileType.NotFound and bucket.type != fs.FileType.NotFound:
    sys.exit()  # no artifact was written so far
fs.copy_files(path, str(Path(sys.argv[2]).resolve()), source_filesystem=source, destination_filesystem=fs.LocalFileSystem())
PYTHON
(cd "${part}" && find . -type f -print0 | sort -z | xargs -0 sha256sum) >"${folder}.sums"
mv "${folder}.sums" "${part}/SHA256SUMS"
mv "${part}" "${folder}"
echo "${folder}: $(wc -l <"${folder}/SHA256SUMS") files"
