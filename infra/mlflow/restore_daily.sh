#!/usr/bin/env bash
# restore_daily.sh FOLDER TIME|newest: restore FOLDER/TIME of backup_daily.sh into what the server's variables name.
set -euo pipefail
if [ "$#" -ne 2 ]; then
  echo "usage: $0 FOLDER TIME|newest" >&2
  exit 2
fi
folder="$1" name="$2" options="region=${AWS_DEFAULT_REGION:-us-east-1}"
if [ -n "${MLFLOW_S3_ENDPOINT_URL:-}" ]; then
  options+="&endpoint_override=${MLFLOW_S3_ENDPOINT_URL}"
fi
if [ "${name}" = newest ]; then
  name="$(find "${folder}" -mindepth 1 -maxdepth 1 -type d -name '20*T*' ! -name '*.part' -printf '%f\n' | sort | tail -n 1)"
fi
if [ -z "${name}" ] || [ ! -f "${folder}/${name}/SHA256SUMS" ]; then
  echo "${folder} has no backup ${name}" >&2
  exit 2
fi
exec "$(dirname "$0")/restore.sh" "${folder}/${name}" "${MLFLOW_BACKEND_STORE_URI}" \
  "${MLFLOW_ARTIFACTS_DESTINATION}?${options}"
