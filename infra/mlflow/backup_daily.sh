#!/usr/bin/env bash
# backup_daily.sh FOLDER: back up what the server's variables name into FOLDER/TIME, and keep the newest BACKUPS_KEPT (7).
set -euo pipefail
if [ "$#" -ne 1 ]; then
  echo "usage: $0 FOLDER" >&2
  exit 2
fi
folder="$1" options="region=${AWS_DEFAULT_REGION:-us-east-1}"
if [ -n "${MLFLOW_S3_ENDPOINT_URL:-}" ]; then
  options+="&endpoint_override=${MLFLOW_S3_ENDPOINT_URL}"
fi
rm -rf "${folder}"/20*.part "${folder}"/20*.sums # of a backup that was stopped
"$(dirname "$0")/backup.sh" "${MLFLOW_BACKEND_STORE_URI}" "${MLFLOW_ARTIFACTS_DESTINATION}?${options}" \
  "${folder}/$(date -u +%Y-%m-%dT%H-%M-%S)"
find "${folder}" -mindepth 1 -maxdepth 1 -type d -name '20*T*' -print0 | sort -rz |
  tail -zn "+$((${BACKUPS_KEPT:-7} + 1))" | xargs -0r rm -rf
