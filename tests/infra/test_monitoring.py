"""Dashboard and alerts use metrics that are exported, as scraped from Ray and queried from Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml

from advtrain.runs.folder import RunFolder
from advtrain.tracking.ray_metrics import CAMPAIGN_METRICS, RUN_METRICS
from tests.cluster_kit import TOKEN, ray_cluster
from tests.kit import ROOT, start_advtrain, user_environment, wait_for
from tests.servers import answers, free_port, running

MONITORING = ROOT / "infra" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboard.json").read_text())
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
PLOTTED = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
OURS = {f"ray_{name}" for name in RUN_METRICS | CAMPAIGN_METRICS}
ON_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}  # not exported on a machine without GPUs


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def test_plotted_metrics_are_exported_by_advtrain_or_ray():
    agent = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    text = agent.read_text()
    for expression in [*PLOTTED, *(rule["expr"] for rule in RULES)]:
        for metric in metrics_of(expression) - OURS:
            assert f'"{metric.removeprefix("ray_")}"' in text, metric


def test_advtrain_metrics_are_all_plotted():
    assert {metric for expression in PLOTTED for metric in metrics_of(expression)} >= OURS


def test_prometheus_config_and_rules_pass_promtool():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    for what, file in (("config", "prometheus.yaml"), ("rules", "alerts.yaml")):
        lint = ["--lint=none"] if what == "config" else []  # its target files exist only on a head node
        done = subprocess.run(
            ["promtool", "check", what, *lint, str(MONITORING / file)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("name", ["alerts_test.yaml", "alerts_backup_test.yaml"])
def test_alerts_fire_as_their_test_file_says(name):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    file = Path(__file__).with_name(name)
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout


def test_alerts_on_lost_series_do_not_need_live_ones():
    """Without promtool: a lost run is seen in its past samples, and an absent target in `up`."""
    expressions = {rule["alert"]: rule["expr"] for rule in RULES}
    for alert in ("TrainingVanished", "RunFailed", "EpochsNotInMlflow"):
        assert re.search(r"(last|max)_over_time\(ray_advtrain_\w+\[\d+[mh]\]\)", expressions[alert])
    assert expressions["RayNotScraped"].startswith("up{")


def test_backup_alerts_name_the_cronjob_and_its_namespace():
    """The labels are those of kube-state-metrics. A job of a CronJob has its name and a number."""
    folder = ROOT / "infra" / "mlflow" / "kubernetes"
    cronjob = list(yaml.safe_load_all((folder / "backup.yaml").read_text()))[-1]["metadata"]
    for rule in RULES:
        for selector in re.findall(r"kube_\w+\{([^}]*)\}", rule["expr"]):
            labels = dict(re.findall(r'(\w+)=~?"([^"]*)"', selector))
            assert labels["namespace"] == cronjob["namespace"], rule["alert"]
            named = labels.get("cronjob") or labels["job_name"].removesuffix("-.+")
            assert named == cronjob["name"], rule["alert"]
    assert [rule["alert"] for rule in RULES if "kube_" in rule["expr"]] == [
        "MlflowBackupFailed",
        "MlflowBackupMissing",
    ]


def test_pod_monitor_has_the_job_name_of_the_alert():
    monitor = yaml.safe_load((MONITORING / "kubernetes" / "podmonitor.yaml").read_text())
    (expression,) = (rule["expr"] for rule in RULES if rule["alert"] == "RayNotScraped")
    job = (
        f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"  # set by the Prometheus operator
    )
    assert re.fullmatch(re.search(r'job=~"([^"]+)"', expression)[1], job)


def test_alerts_convert_to_a_prometheus_rule():
    """The command in infra/README.md, up to kubectl."""
    text = (ROOT / "infra" / "README.md").read_text()
    command = re.search(r"^ *(\(.*)\| kubectl apply -f -$", text, re.M)[1]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    rule = yaml.safe_load(done.stdout)
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"]["groups"][0]["rules"] == RULES


def test_readme_names_every_alert_and_every_folder():
    text = (ROOT / "infra" / "README.md").read_text()
    for rule in RULES:
        assert f"`{rule['alert']}`" in text
    for folder in (path for path in (ROOT / "infra").iterdir() if path.is_dir()):
        assert re.search(rf"^\| (`|\[`){folder.name}`", text, re.M), folder.name


def scraped(url: str) -> dict[str, list[tuple[str, float]]]:
    """Return {name: [(labels, value)]} of the samples that a metrics agent exports."""
    found: dict[str, list[tuple[str, float]]] = {}
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except OSError:
        return {}
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line):
            found.setdefault(match[1], []).append((match[2], float(match[3])))
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_metrics_of_running_training_and_campaign_are_scraped(tmp_path):
    with ray_cluster(tmp_path, nodes=1) as cluster:
        url = f"http://{cluster.head.ip}:{cluster.metrics}/metrics"
        seen: dict[str, list[tuple[str, float]]] = {}

        def there(names: set[str]) -> bool:
            seen.update(scraped(url))
            return names <= seen.keys()

        small = ["training.epochs=5000", "evaluation.suite=null", "evaluation.attack={num_steps: 5}"]
        small += ["training.num_workers=1", "adversary.num_steps=20"]
        command = ["train", "digits", "--address", cluster.address, *(w for s in small for w in ("--set", s))]
        training = start_advtrain(*command, cwd=tmp_path, env=TOKEN)
        try:
            at_the_end = {"ray_advtrain_test_robust_accuracy"}
            running_now = {f"ray_{name}" for name in RUN_METRICS} - at_the_end
            wait_for(lambda: there(running_now), "the run's metrics", 180)
            with prometheus(tmp_path, url) as query:
                in_the_run = [e for e in PLOTTED if metrics_of(e) <= running_now | {"ray_node_mem_used"}]
                assert len(in_the_run) >= 11
                for expression in in_the_run:
                    asked = re.sub(r"\$\w+", ".*", expression)
                    wait_for(lambda e=asked: query(e), f"an answer to {asked}", 60)
                for rule in RULES:
                    query(rule["expr"])  # an error would be raised
        finally:
            training.terminate()
            assert training.wait(120) == 130
        run = RunFolder(next((tmp_path / "runs").iterdir()))
        labels, accuracy = seen["ray_advtrain_validation_robust_accuracy"][-1]
        assert f'run="{run.name}"' in labels
        assert 'recipe="digits"' in labels
        assert accuracy in [line["val_robust_accuracy"] for line in run.metrics()]
        tune = ["tune", "digits_quick", "--trials", "4", "--address", cluster.address]
        campaign = start_advtrain(*tune, cwd=tmp_path, env=TOKEN)
        try:
            wait_for(lambda: there({f"ray_{n}" for n in CAMPAIGN_METRICS}), "the campaign's metrics", 180)
        finally:
            campaign.terminate()
            campaign.wait(120)
        assert any('state="running"' in labels for labels, _ in seen["ray_advtrain_trials"])


DRIVER = """
import sys
import ray
from advtrain.tracking import ray_metrics

ray.init(address=sys.argv[1], logging_level="ERROR")
ray_metrics._set("advtrain_failed", 1.0, {"run": "a", "recipe": "b"})
"""


@pytest.mark.slow
@pytest.mark.ray
def test_last_value_of_a_process_that_ended_is_scraped(tmp_path):
    """The alert RunFailed depends on it: the process ends right after it has set the gauge."""
    with ray_cluster(tmp_path, nodes=0) as cluster:
        environment = user_environment(TOKEN | {"PYTHONPATH": str(ROOT)})
        subprocess.run([sys.executable, "-c", DRIVER, cluster.address], env=environment, check=True)
        found = scraped(f"http://{cluster.head.ip}:{cluster.metrics}/metrics")
        assert [value for _, value in found["ray_advtrain_failed"]] == [1.0]


class prometheus:  # noqa: N801 (a context manager, used as a word)
    """Run Prometheus on one target with the project's rules; gives a query function."""

    def __init__(self, folder: Path, target: str) -> None:
        if shutil.which("prometheus") is None:
            pytest.skip("Prometheus is not installed (Debian: prometheus)")
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
        config["global"]["scrape_interval"] = "1s"
        config["rule_files"] = [str(MONITORING / "alerts.yaml")]
        address = urllib.parse.urlparse(target).netloc
        config["scrape_configs"] = [{"job_name": "ray", "static_configs": [{"targets": [address]}]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}"]
        command += [f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address={self.url[7:]}"]
        self.server = running(command, folder / "prometheus.log")

    def __enter__(self):
        self.server.__enter__()
        wait_for(lambda: answers(f"{self.url}/-/ready"), "Prometheus", 60)
        return self.query

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(*error)

    def query(self, expression: str) -> list[object]:
        asked = urllib.parse.urlencode({"query": expression})
        answer = json.load(urllib.request.urlopen(f"{self.url}/api/v1/query?{asked}", timeout=10))
        assert answer["status"] == "success", answer
        return answer["data"]["result"]
