"""A registry on this machine, open or behind TLS and tokens, and a slow link to it."""

import base64
import contextlib
import http.server
import json
import math
import ssl
import subprocess
import threading
import time
import urllib.parse
import urllib.request

from machine import BIN, Failed, process, run

USER, PASSWORD = "reader", "correct horse"
LIFETIME = 600  # of a token, seconds


@contextlib.contextmanager
def registry(work, http="", auth=""):
    """docker-registry on a free loopback port, with its storage in `work`; yields HOST:PORT. `http` and
    `auth` go into these parts of its configuration."""
    config = f"{work}/registry{'-guarded' if auth else ''}.yml"
    with open(config, "w", encoding="utf-8") as file:
        file.write(
            "version: 0.1\nlog:\n  level: info\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n"
            f"    rootdirectory: {work}/storage\nhttp:\n  addr: 127.0.0.1:0\n{http}{auth}"
        )
    with process(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if "listening on " in line:
                threading.Thread(target=child.stderr.read, daemon=True).start()
                yield line.split("listening on ")[1].split('"')[0].split(",")[0]
                return
        raise Failed("docker-registry does not listen")


class Link:
    """A running link-relay: its address, and what went over it since `forget`."""

    def __init__(self, address, control):
        self.address, self.control = address, control
        self.forget()

    def _now(self):
        with urllib.request.urlopen(f"http://{self.control}/", timeout=10) as answer:
            return json.load(answer)

    def forget(self):
        self.start = self._now()

    def counted(self):
        now = self._now()
        return {key: now[key] - self.start[key] for key in now}


@contextlib.contextmanager
def link(upstream, round_trip, rate, log=None):
    command = [f"{BIN}/link-relay", "--upstream", upstream, "--delay", str(round_trip), "--rate", str(rate)]
    command += ["--control", "127.0.0.1:0"] + (["--log", log] if log else [])
    with process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield Link(child.stdout.readline().strip(), child.stdout.readline().strip())


def fetch(url, accept="*/*"):
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": accept}), timeout=60) as answer:
        return answer.read()


class Tokens(http.server.BaseHTTPRequestHandler):
    """The token server: whoever logs in gets a token for what they ask for, signed by the key in `work`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes: the second would wait for a late ACK
    work = None
    tokens = None  # by scope: a real server signs faster than a process starts

    def do_GET(self):  # pylint: disable=invalid-name
        """Answers a request for a token with a login in its head."""
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        known = self.headers.get("Authorization") == f"Basic {login}"
        self.answer(known, urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query))

    def do_POST(self):  # pylint: disable=invalid-name
        """Answers a request for a token in the form of OAuth2, as public registries do."""
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.answer((form.get("username"), form.get("password")) == ([USER], [PASSWORD]), form)

    def answer(self, known, asked):
        """A token for the scope that is asked for, to those who are known."""
        if not known:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="bench"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        scope = asked["scope"][0]
        made, token = self.tokens.get(scope, (-math.inf, None))
        if time.monotonic() - made > LIFETIME / 2:
            kind, name, actions = scope.split(":")
            token = self.token({"type": kind, "name": name, "actions": actions.split(",")})
            self.tokens[scope] = (time.monotonic(), token)
        body = json.dumps({"token": token, "expires_in": LIFETIME // 2}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def token(self, access):
        """A JSON web token (RS256), with its certificate in the head."""

        def encoded(data):
            return base64.urlsafe_b64encode(data).rstrip(b"=")

        with open(f"{self.work}/tls.crt", encoding="ascii") as file:
            certificate = "".join(file.read().split("-----")[2].split())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [certificate]}
        now = int(time.time())
        claims = {"iss": "bench", "sub": USER, "aud": "bench", "nbf": now - 10, "iat": now, "exp": now + LIFETIME}
        claims |= {"jti": str(now), "access": [access]}
        signed = b".".join(encoded(json.dumps(part).encode()) for part in (head, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", f"{self.work}/tls.key"]
        done = subprocess.run(command, input=signed, capture_output=True, check=True)
        return (signed + b"." + encoded(done.stdout)).decode()

    def log_message(self, *_):  # pylint: disable=arguments-differ
        """Says nothing."""


@contextlib.contextmanager
def guarded_registry(work, round_trip, rate):
    """The registry over `work` behind TLS, with a token server of its own, both over a slow link; yields
    the Link of the registry. Clients trust `work`/ca.crt and log in by `work`/config.json (DOCKER_CONFIG)."""
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt",
        "req -newkey rsa:2048 -nodes -subj /CN=bench -addext subjectAltName=IP:127.0.0.1 -keyout tls.key -out tls.csr",
        "x509 -req -in tls.csr -CA ca.crt -CAkey ca.key -CAcreateserial -copy_extensions copy -days 2 -out tls.crt",
    ):
        run("openssl", *command.split(), cwd=work)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{work}/tls.crt", f"{work}/tls.key")
    handler = type("TokensOf", (Tokens,), {"work": work, "tokens": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with link(f"127.0.0.1:{server.server_address[1]}", round_trip, rate) as tokens:
                tls = f"  tls:\n    certificate: {work}/tls.crt\n    key: {work}/tls.key\n"
                auth = f"auth:\n  token:\n    realm: https://{tokens.address}/token\n    service: bench\n"
                auth += f"    issuer: bench\n    rootcertbundle: {work}/ca.crt\n"
                with registry(work, tls, auth) as host, link(host, round_trip, rate) as between:
                    login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
                    with open(f"{work}/config.json", "w", encoding="utf-8") as file:
                        json.dump({"auths": {between.address: {"auth": login}}}, file)
                    yield between
        finally:
            server.shutdown()


