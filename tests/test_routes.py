"""The service as clients see it: ids, versions, one form of errors, several images, options, keys, CORS, models that change."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
import yaml
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException
from test_serve import NAMES, PNG, TINY, image, refused, same

import groupmixformer
from groupmixformer import GroupMixFormer
from groupmixformer.cli.inference import _keys
from groupmixformer.cli.main import main, parse
from groupmixformer.data.images import decode
from groupmixformer.deploy import reload
from groupmixformer.deploy.reload import Reloader, Source, checksum
from groupmixformer.deploy.routes import application
from groupmixformer.deploy.serve import Limits, Model, Service, served
from groupmixformer.models.checkpoint import save_checkpoint
from groupmixformer.run_folder import RunFolder
from groupmixformer.tasks.classification.predict import ClassificationPredictor


@pytest.fixture(scope="module")
def run(tmp_path_factory, randomise):
    folder = tmp_path_factory.mktemp("classifier")
    save_checkpoint(randomise(GroupMixFormer(num_classes=8, **TINY)), folder, NAMES, {"input_size": (3, 32, 32)})
    return folder


@pytest.fixture(scope="module")
def classes(run):
    return ClassificationPredictor(run, torch.device("cpu"))


def boxes(images, score_threshold=0.5):
    """A detector of three objects, whose class is the size of the file."""
    scores = [score for score in (0.9, 0.3, 0.1) if score >= score_threshold]
    return [{"objects": [{"class": str(size), "score": score, "box": [0, 0, 1, 1]} for score in scores]} for size in images]


def refuse_empty(content):
    if not content:
        raise ValueError("image: not a readable image: no known format")
    return len(content)


@pytest.fixture(scope="module")
def client(classes):
    """Of a server of two models: `a b`, a classifier, and `things`, a detector of which only the form is real."""
    first = served(classes, "a b", "classification", "0123abcd")
    second = Model("things", "detection", refuse_empty, boxes, False, ("score_threshold",), "ffff")
    with TestClient(application(Service([first, second], Limits(queue=8, per_client=8)))) as made:
        yield made


def test_answers_have_ids_and_versions(client):
    answer = client.post("/predict", content=image(1), headers=PNG | {"X-Request-ID": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-model-version"] == "a%20b@0123abcd"
    assert answer.headers["x-package-version"] == groupmixformer.__version__
    assert client.post("/predict/things", content=b"x", headers=PNG).headers["x-model-version"] == "things@ffff"
    start = client.get("/", follow_redirects=False)
    assert (start.status_code, start.headers["location"]) == (307, "docs")
    health = client.get("/health", headers={"X-Request-ID": "no good"})
    assert re.fullmatch("[0-9a-f]{32}", health.headers["x-request-id"])
    assert "x-model-version" not in health.headers  # there are two
    about = [
        {"model": "a b", "task": "classification", "weights": "0123abcd"},
        {"model": "things", "task": "detection", "weights": "ffff"},
    ]
    assert health.json() == {"ready": True, **about[0], "version": groupmixformer.__version__, "models": about}


def test_every_error_has_one_form(client):
    assert [refused(client.get(path)) for path in ("/nothing", "/predict")] == ["Not Found", "Method Not Allowed"]
    assert refused(client.post("/predict/other", content=b"x", headers=PNG)) == "got model other, expected a b or things"
    assert refused(client.get("/static-offline-docs/nothing.js")) == "Not Found"
    wrong = {
        "top=0": "top: got 0: Input should be greater than or equal to 1",
        "top=x": "top: got x: Input should be a valid integer, unable to parse string as an integer",
        "score_threshold=0.5": "score_threshold: no parameter of a b, a model for classification: expected top",
        "tpo=3": "tpo: no parameter of a b, a model for classification: expected top",
    }
    for query, line in wrong.items():
        answer = client.post(f"/predict?{query}", content=image(1), headers=PNG)
        assert (answer.status_code, refused(answer)) == (422, line)
    for value in ("nan", "0", "1.5"):
        assert client.post(f"/predict/things?score_threshold={value}", content=b"x", headers=PNG).status_code == 422


def test_what_nobody_foresaw_is_such_an_error_too(classes, caplog):
    made = Service([served(classes, "tested", "classification")], Limits())
    made.metrics = lambda: 1 / 0
    with TestClient(application(made)) as client:
        answer = client.get("/metrics")
    assert (answer.status_code, refused(answer)) == (500, "the server failed: ZeroDivisionError")
    assert answer.json()["request_id"] in caplog.text


def test_several_images_are_answered_in_their_order(client, classes):
    contents = [image(seed) for seed in range(5)]
    answer = client.post("/predict", files=[("files", ("a.png", content)) for content in contents]).json()
    assert set(answer) == {"images", "model", "task", "milliseconds"}
    for found, content in zip(answer["images"], contents, strict=True):
        same(found, classes.predict(decode(content, "")).result)
    assert len(client.post("/predict", files=[("files", ("a.png", contents[0]))]).json()["images"]) == 1
    assert len(client.post("/predict", files=[("file", ("a.png", contents[0]))] * 2).json()["images"]) == 2
    assert "classes" in client.post("/predict", files=[("file", ("a.png", contents[0]))]).json()
    answer = client.post("/predict/things", files=[("files", ("a", bytes(n))) for n in (3, 1, 2)]).json()
    assert [one["objects"][0]["class"] for one in answer["images"]] == ["3", "1", "2"]
    for path in ("/predict", "/predict/things"):
        answer = client.post(path, files=[("files", ("a", image(1))), ("files", ("b", b""))])
        assert (answer.status_code, refused(answer)) == (400, "image 2 of 2: not a readable image: no known format")
    answer = client.post("/predict", files=[("files", ("a", image(1)))] * 9)
    assert answer.status_code == 400 and "8" in refused(answer)  # places that there are
    assert "gmf_queue_length 0" in client.get("/metrics").text


def test_several_images_take_several_places(classes):
    made = Service([served(classes, "tested", "classification")], Limits(queue=4, per_client=3))
    with made._places(1, "a"), made._places(2, "a"):
        for images, who, status in ((1, "a", 429), (2, "b", 503)):
            with pytest.raises(HTTPException) as refusal, made._places(images, who):
                pass
            assert (refusal.value.status_code, refusal.value.headers["Retry-After"]) == (status, "1")
        with made._places(1, "b"):
            assert made._inside == 4
    assert (made._inside, made._clients) == (0, {})


def test_requests_choose_top_and_score(client):
    tops = [
        client.post(f"/predict{query}", content=image(1), headers=PNG).json()["classes"] for query in ("", "?top=2", "?top=99")
    ]
    assert [len(one) for one in tops] == [5, 2, 8]
    assert tops[2][:5] == tops[0]
    scores = [
        client.post(f"/predict/things{query}", content=b"x", headers=PNG).json()["objects"]
        for query in ("", "?score_threshold=0.2", "?score_threshold=1")
    ]
    assert [len(one) for one in scores] == [1, 2, 0]


def test_docs_are_filled_and_load_nothing_from_elsewhere(client):
    page = client.get("/docs").text
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    for asset in re.findall(r'(?:src|href)="([^"]+)"', page):
        assert client.get(asset).status_code == 200, asset
    schema = client.get("/openapi.json").json()
    for path in ("/predict", "/predict/{name}"):
        post = schema["paths"][path]["post"]
        assert {"top", "score_threshold"} <= {one["name"] for one in post["parameters"]}
        assert set(post["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
        assert {"200", "400", "401", "413", "415", "422", "429", "500", "503"} <= set(post["responses"])
        assert post["responses"]["422"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
        examples = post["responses"]["200"]["content"]["application/json"]["examples"]
        answer = client.post("/predict", content=image(1), headers=PNG).json()
        assert set(examples["classification"]["value"]) == set(answer)
    (name,) = [one["schema"] for one in post["parameters"] if one["name"] == "name"]
    assert name["enum"] == ["a b", "things"]
    fields = set(schema["components"]["schemas"]["Health"]["properties"])
    assert fields == set(client.get("/health").json()) == set(schema["components"]["schemas"]["Health"]["example"])


def test_a_key_is_asked_for(classes, tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("first-key\n\nzwölf\n")
    keys = _keys(file)
    assert keys == ["first-key", "zwölf"]
    made = Service([served(classes, "tested", "classification")], Limits())
    with TestClient(application(made, keys)) as client:
        good = [{"Authorization": "Bearer first-key"}, {"authorization": "bearer  first-key"}, {"X-API-Key": "first-key"}]
        good.append({b"X-API-Key": "zwölf".encode()})
        for headers in good:
            assert client.post("/predict", content=image(1), headers={**PNG, **headers}).status_code == 200
        for headers in ({}, {"Authorization": "Basic first-key"}, {"X-API-Key": "first-ke"}, {"Authorization": "Bearer "}):
            answer = client.post("/predict", content=image(1), headers=PNG | headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert refused(answer).startswith("expected an API key")
        assert [client.get(path).status_code for path in ("/health", "/docs", "/metrics", "/")] == [200, 200, 401, 401]
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    monkeypatch.setenv("GMF_API_KEY", "of the environment")
    assert _keys(None) == ["of the environment"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no API key, expected one a line"):
        _keys(file)


def test_pages_of_other_sites_are_let_in_by_name(classes, client):
    ask = {
        "Origin": "https://lab.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }
    assert "access-control-allow-origin" not in client.get("/health", headers=ask).headers
    made = Service([served(classes, "tested", "classification")], Limits())
    with TestClient(application(made, ["key"], ["https://lab.example"])) as own:
        answer = own.options("/predict", headers=ask)  # browsers ask without the key
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://lab.example")
        answer = own.post("/predict", content=b"", headers=ask)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "https://lab.example")
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        assert "access-control-allow-origin" not in own.get("/health", headers={"Origin": "https://evil.example"}).headers


def test_a_run_that_changes_is_loaded_beside_and_swapped(tmp_path, randomise, monkeypatch, caplog):
    monkeypatch.setattr(reload, "INTERVAL", 0.02)

    def write(seed):
        network = randomise(GroupMixFormer(num_classes=8, **TINY))  # always the same
        torch.nn.init.constant_(network.head.fc.bias, seed)
        save_checkpoint(network, tmp_path, [f"{seed} {name}" for name in NAMES], {"input_size": (3, 32, 32 + seed)})

    def load():
        predictor = ClassificationPredictor(tmp_path, torch.device("cpu"))
        return served(predictor, "tested", "classification", checksum(RunFolder(tmp_path)))

    write(0)
    source = Source(RunFolder(tmp_path), load)
    made = Service([source.load()], Limits())
    reloader = Reloader(made, {"tested": source})

    def seen():
        answer = client.post("/predict", content=image(1), headers=PNG)
        assert answer.status_code == 200
        return answer.json()["classes"][0]["class"][0], answer.headers["x-model-version"]

    def until(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, caplog.text
            time.sleep(0.05)

    with TestClient(application(made, reloader=reloader)) as client:
        before = seen()
        assert before == ("0", f"tested@{checksum(RunFolder(tmp_path))}")
        write(1)  # another size of images, another config.json
        until(lambda: seen() == ("1", f"tested@{checksum(RunFolder(tmp_path))}"))  # two files, one renamed after the other
        after = seen()
        assert after[1] != before[1]
        assert f"tested: loaded again, weights {after[1][7:]} instead of {before[1][7:]}" in caplog.messages
        (tmp_path / "damaged").write_bytes(b"half a file")
        (tmp_path / "damaged").replace(tmp_path / "model.safetensors")  # at once, to be tried once
        until(lambda: f"tested: not loaded again, weights {after[1][7:]} stay: ValueError: " in caplog.text)
        assert seen() == after
        time.sleep(0.2)
        assert caplog.text.count("not loaded again") == 1  # until the file changes again
        reloader.ask()
        until(lambda: caplog.text.count("not loaded again") == 2)
        (tmp_path / "model.safetensors").unlink()
        time.sleep(0.2)
        assert seen() == after
        write(2)
        until(lambda: seen()[0] == "2")


def test_runs_of_one_name_are_refused(run, capsys):
    assert main(["serve", str(run), str(run), "--port", "0"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"gmf: error: got models named {run.name}, {run.name}") and line.count("\n") == 1


def test_the_container_runs_a_command_that_exists():
    docker = Path(__file__).parents[1] / "docker"
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", (docker / "Dockerfile").read_text(), re.M)[1]
    composed = yaml.safe_load((docker / "compose.yaml").read_text())["services"]["gmf"]
    name, *words = [*json.loads(entry), *composed["command"]]
    assert name == "gmf"
    _, (runs,), given = parse(words)
    assert (list(runs), given["host"], list(given["allowed_hosts"])) == (["/runs/photos"], "0.0.0.0", ["gmf"])
    assert str(given["api_key_file"]) == f"/run/secrets/{composed['secrets'][0]}" and given["access_log"]
