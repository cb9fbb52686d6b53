"""Our tasks and our page in a real Label Studio, labelled in a browser. How to run it: docs/annotation/README.md."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("MEGATRON_SAFE_LABEL_STUDIO")
TOKEN = "0123456789abcdef0123456789abcdef01234567"  # of a server that lives as long as this test
USER, PASSWORD = "someone@example.org", "ferns-and-lamps"
PAIRS = [
    {
        "prompt": "And how often does it need water?",
        "history": [["Does a fern grow beside my lamp?", "Yes, if the lamp is not too warm."]],
        "response_0": "Once or twice a week.\nFeel the soil first: it should be a little <damp>, never wet.",
        "response_1": "Pour the water over the lamp, then over the fern.",
        "origin": "round 1",
    },
    {"prompt": "Which lamp is warm?", "response_0": "", "response_1": "The red one."},
]  # fmt: skip
CHROMIUM = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1400,1800""".split()

pytestmark = [
    pytest.mark.label_studio,
    pytest.mark.skipif(
        PROGRAM is None, reason="MEGATRON_SAFE_LABEL_STUDIO names no label-studio; docs/annotation/README.md says how"
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """call(method, path, body) -> the reply of a fresh Label Studio on this machine; `call.url` is where it is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("label-studio")
    command = [
        PROGRAM, "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port), "--data-dir",
        str(folder / "data"), "--username", USER, "--password", PASSWORD, "--user-token", TOKEN,
        "--enable-legacy-api-token", "--log-level", "ERROR",
    ]  # fmt: skip
    quiet = {"COLLECT_ANALYTICS": "0", "LATEST_VERSION_CHECK": "0"}
    url = f"http://127.0.0.1:{port}"

    def call(method, path, body=None):
        headers = {"Authorization": f"Token {TOKEN}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers, method=method)) as reply:
            return json.loads(reply.read())

    call.url = url
    log = (folder / "log").open("w")
    with subprocess.Popen(command, env=os.environ | quiet, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 600  # its first start makes a database, which takes minutes
            while True:
                try:
                    call("GET", "/api/projects/")
                    break
                except (urllib.error.URLError, ConnectionError):
                    said = (folder / "log").read_text()[-2000:]
                    assert process.poll() is None and time.monotonic() < deadline, said
                    time.sleep(1)
            yield call
        finally:
            process.terminate()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium; docs/annotation/README.md says how")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver; docs/annotation/README.md says how")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*CHROMIUM, f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_page_load_timeout(120)
    yield driver
    driver.quit()


def annotate(*arguments):
    """tools/annotate.py, as a person runs it."""
    command = [sys.executable, ROOT / "tools" / "annotate.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_labelled_in_the_browser_comes_back(server, browser, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    annotate("export", tmp_path / "pairs.jsonl", "--out", tmp_path)
    project = server(
        "POST", "/api/projects/",
        {"title": "Pairs", "label_config": (tmp_path / "labels.xml").read_text(), "maximum_annotations": 2},
    )["id"]  # fmt: skip
    tasks = json.loads((tmp_path / "tasks.json").read_text())
    assert server("POST", f"/api/projects/{project}/import", tasks)["task_count"] == 2
    first, second = (task["id"] for task in server("GET", f"/api/tasks?project={project}")["tasks"])

    label(browser, server, project, first, tasks[0]["data"])
    deadline = time.monotonic() + 60
    while not server("GET", f"/api/tasks/{first}/annotations/"):
        assert time.monotonic() < deadline, "nothing was submitted"
        time.sleep(0.5)
    server("POST", f"/api/tasks/{second}/annotations/", {"result": [], "was_cancelled": True})

    export = server("GET", f"/api/projects/{project}/export?exportType=JSON")
    (tmp_path / "export.json").write_text(json.dumps(export))
    said = annotate("import", tmp_path / "export.json", "--out", tmp_path / "labelled")
    assert "1 annotations count, 0 superseded, 1 skipped" in said and USER not in said
    (row,) = map(json.loads, (tmp_path / "labelled" / "comparisons.jsonl").read_text().splitlines())
    assert row.items() >= PAIRS[0].items()
    assert (row["better_response_id"], row["safer_response_id"]) == (0, "tie")
    assert (row["is_response_0_safe"], row["is_response_1_safe"]) == (True, False)
    harms = [[name for name, there in row[f"response_{i}_harm_category"].items() if there] for i in (0, 1)]
    assert harms == [[], ["misinformation_regarding_ethics,laws_and_safety", "violence,aiding_and_abetting,incitement"]]
    report = json.loads((tmp_path / "labelled" / "report.json").read_text())
    assert report["annotators"]["annotator 1"]["median_seconds"] > 0
    assert (report["contradictions"], report["tasks_without_annotation"]) == ([], 1)


def label(browser, server, project, task, data):
    """Log in, see that nothing can be submitted empty, tick what the test expects, take the picture, submit."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(for_what):
        return WebDriverWait(browser, 120).until(lambda _: for_what())

    def inputs(name):
        """Those choices of a name that can be seen, from the top left."""
        found = browser.find_elements(By.CSS_SELECTOR, f"label input[name='{name}']")
        boxes = [one.find_element(By.XPATH, "./ancestor::label") for one in found]
        return [box for box in boxes if box.is_displayed()]

    def submit():
        browser.find_element(By.CSS_SELECTOR, "button[name=submit]").click()

    browser.get(f"{server.url}/user/login/")
    browser.find_element(By.NAME, "email").send_keys(USER)
    browser.find_element(By.NAME, "password").send_keys(PASSWORD)
    browser.find_element(By.CSS_SELECTOR, "form button[type=submit]").click()
    wait(lambda: "/login" not in browser.current_url)
    browser.get(f"{server.url}/projects/{project}/data?task={task}")
    wait(lambda: len(inputs("safe")) == 2)
    shown = browser.find_element(By.TAG_NAME, "body").text
    for text in ("Yes, if the lamp is not too warm.", PAIRS[0]["prompt"], "<damp>", "over the lamp, then"):
        assert text in shown
    assert not inputs("self harm")  # only what is unsafe is asked about

    submit()
    wait(lambda: "Say whether answer A is safe." in browser.find_element(By.TAG_NAME, "body").text)
    browser.find_element(By.XPATH, "//div[@role='dialog']//button[contains(., 'OK')]").click()
    wait(lambda: not browser.find_elements(By.CSS_SELECTOR, ".ant-modal-wrap:not([style*='none'])"))

    # Where response 0, the good one, stands.
    good = int(data["first"] != PAIRS[0]["response_0"])
    inputs("safe")[good].click()
    inputs("unsafe")[1 - good].click()
    wait(lambda: inputs("self harm"))
    for harm in ("violence, aiding and abetting, incitement", "misinformation regarding ethics, laws and safety"):
        (box,) = inputs(harm)
        box.click()
    inputs(f"Answer {'AB'[good]}")[0].click()
    inputs("No difference")[1].click()
    browser.save_screenshot(ROOT / "docs" / "annotation" / "labelling.png")
    submit()
