//! A document read key by key: types checked, unknown keys named with their nearest kin.
//!
//! Each `take_*` call removes one key and remembers that it is known. What is left when a
//! section is finished is unknown: ignored, with a warning, because clients of several
//! generations send keys that mean nothing here.

use serde_json::{Map, Value};

use super::ConfigError;

/// Keys further away than this many edits are not worth suggesting.
const SUGGESTION_DISTANCE: usize = 3;

/// One object of a configuration document.
pub struct Section {
    path: String,
    map: Map<String, Value>,
    known: Vec<&'static str>,
}

impl Section {
    /// The whole document.
    ///
    /// # Errors
    /// It is not an object.
    pub fn root(value: Value) -> Result<Self, ConfigError> {
        match value {
            Value::Object(map) => Ok(Self { path: String::new(), map, known: Vec::new() }),
            other => Err(ConfigError::new(format!("want an object, found {}", kind(&other)))),
        }
    }

    /// Full name of `key`, as in `device.backend.type`.
    pub fn name(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The value of `key`; absent and null are the same.
    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.map.remove(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, want: &str, found: &Value) -> ConfigError {
        ConfigError::new(format!("`{}`: want {want}, found {}", self.name(key), kind(found)))
    }

    /// A string.
    pub fn take_string(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a string", &other)),
        }
    }

    /// A string that must be there and not be empty.
    pub fn require_string(&mut self, key: &'static str) -> Result<String, ConfigError> {
        match self.take_string(key)? {
            Some(text) if !text.is_empty() => Ok(text),
            _ => Err(ConfigError::new(format!("`{}` is required and must not be empty", self.name(key)))),
        }
    }

    /// A boolean.
    pub fn take_bool(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.wrong(key, "true or false", &other)),
        }
    }

    /// A whole number, not negative.
    pub fn take_u64(&mut self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(key, "a whole number, 0 or more", &value)),
            },
        }
    }

    /// A number, fractions allowed.
    pub fn take_f64(&mut self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number)),
                None => Err(self.wrong(key, "a number", &value)),
            },
        }
    }

    /// A list of strings; absent is empty.
    pub fn take_strings(&mut self, key: &'static str) -> Result<Vec<String>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let Value::Array(items) = value else { return Err(self.wrong(key, "a list of strings", &value)) };
        items
            .into_iter()
            .map(|item| match item {
                Value::String(text) => Ok(text),
                other => Err(self.wrong(key, "a list of strings", &other)),
            })
            .collect()
    }

    /// A list of whole numbers; absent is `None`.
    pub fn take_numbers(&mut self, key: &'static str) -> Result<Option<Vec<u64>>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let numbers =
            value.as_array().and_then(|items| items.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        numbers.map(Some).ok_or_else(|| self.wrong(key, "a list of whole numbers", &value))
    }

    /// A nested object.
    pub fn take_section(&mut self, key: &'static str) -> Result<Option<Self>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { path: self.name(key), map, known: Vec::new() })),
            Some(other) => Err(self.wrong(key, "an object", &other)),
        }
    }

    /// A list of objects; absent is empty.
    pub fn take_sections(&mut self, key: &'static str) -> Result<Vec<Self>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let Value::Array(items) = value else { return Err(self.wrong(key, "a list of objects", &value)) };
        let place = |index| format!("{}[{index}]", self.name(key));
        items
            .into_iter()
            .enumerate()
            .map(|(index, item)| match item {
                Value::Object(map) => Ok(Self { path: place(index), map, known: Vec::new() }),
                other => Err(self.wrong(key, "a list of objects", &other)),
            })
            .collect()
    }

    /// An object of strings; absent is empty. Messages do not repeat the values.
    pub fn take_string_map(&mut self, key: &'static str) -> Result<Vec<(String, String)>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        let Value::Object(map) = value else { return Err(self.wrong(key, "an object of strings", &value)) };
        map.into_iter()
            .map(|(name, value)| match value {
                Value::String(text) => Ok((name, text)),
                other => Err(self.wrong(key, "an object of strings", &other)),
            })
            .collect()
    }

    /// A nested object that must be there.
    pub fn require_section(&mut self, key: &'static str) -> Result<Self, ConfigError> {
        self.take_section(key)?.ok_or_else(|| ConfigError::new(format!("`{}` is required", self.name(key))))
    }

    /// Refuses `key` by name when it asks for something.
    ///
    /// # Errors
    /// The key is present and neither null, false, zero nor empty.
    pub fn refuse(&mut self, key: &'static str) -> Result<(), ConfigError> {
        match self.take(key) {
            Some(value) if asks_for_something(&value) => Err(ConfigError::new(format!(
                "`{}` is not built yet; leave it out or at its default",
                self.name(key)
            ))),
            _ => Ok(()),
        }
    }

    /// Accepts `key` from clients that send it, with a warning when it asks for something.
    pub fn no_effect(&mut self, key: &'static str, warnings: &mut Vec<String>) {
        if self.take(key).is_some_and(|value| asks_for_something(&value)) {
            warnings.push(format!("`{}` has no effect yet", self.name(key)));
        }
    }

    /// Ends the section: every key nobody asked for is ignored with a warning.
    pub fn finish(self, warnings: &mut Vec<String>) {
        for key in self.map.keys() {
            let nearest = self
                .known
                .iter()
                .map(|known| (strsim::damerau_levenshtein(key, known), known))
                .filter(|(distance, known)| *distance <= SUGGESTION_DISTANCE.min(known.len() / 2))
                .min();
            let hint = nearest.map_or_else(String::new, |(_, known)| format!("; did you mean `{known}`?"));
            warnings.push(format!("unknown key `{}` is ignored{hint}", self.name(key)));
        }
    }
}

/// False for every value that leaves a feature off.
fn asks_for_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => map.values().any(asks_for_something),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
