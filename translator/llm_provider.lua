-- The request side of an LLM provider, an *upstream* HTTP filter of its cluster. It runs again for each
-- attempt, on the client's own body: what a retry sends to another provider is made here anew, from that
-- provider's data.
--
-- The data are the filter's `filter_context`; translator/lua.py makes it and documents it:
--   {id, host, prefix, operations: ["METHOD suffix [path]" or ["METHOD suffix [path]", member...]]}
--   member: [mode, JSON text, key, inner key or none]
--
-- The body is not decoded. Its bytes are checked against the JSON grammar in one pass, in which the places of
-- the configured members are found; only these bytes change, so big integers, number formats, key order and
-- white space stay.
--
-- About ffi: the pass reads the body through a raw pointer, in loops that LuaJIT compiles. That is safe
-- because a Lua string always ends in a NUL byte, which no loop passes: no JSON token holds a NUL, so the NUL
-- is the end of every loop. There is no second scanner for a Lua without ffi: there this file does not load
-- and Envoy refuses the cluster (a NACK that says why), which is safer than a rarely used copy of a security
-- check.

local ffi = require("ffi")
local byte, find, match, sub = string.byte, string.find, string.match, string.sub
local concat = table.concat

-- --------------------------------------------------------------------------------------------------
-- JSON

local MAX_DEPTH = 512 -- arrays and objects open at once, the body's own object included

-- What a byte is: 0 or, where it belongs to the class, 1.
local SPECIAL = ffi.new("uint8_t[256]") -- not simply a character of a string: quote, backslash, control, NUL
local SPACE = ffi.new("uint8_t[256]")
local DIGIT = ffi.new("uint8_t[256]")
local HEX = ffi.new("uint8_t[256]")
local ESCAPE = ffi.new("uint8_t[256]") -- behind a backslash: 1 complete, 2 four hexadecimal digits follow
for c = 0, 31 do SPECIAL[c] = 1 end
for c in ('"\\'):gmatch(".") do SPECIAL[byte(c)] = 1 end
for c in (" \t\n\r"):gmatch(".") do SPACE[byte(c)] = 1 end
for c in ("0123456789"):gmatch(".") do DIGIT[byte(c)] = 1 end
for c in ("0123456789abcdefABCDEF"):gmatch(".") do HEX[byte(c)] = 1 end
for c in ('"\\/bfnrt'):gmatch(".") do ESCAPE[byte(c)] = 1 end
ESCAPE[byte("u")] = 2

local QUOTE, BACKSLASH, COMMA, COLON = byte('"'), byte("\\"), byte(","), byte(":")
local OBJECT, OBJECT_END, ARRAY = byte("{"), byte("}"), byte("[")
local MINUS, PLUS, DOT, ZERO = byte("-"), byte("+"), byte("."), byte("0")

-- All positions count from 0. Each *_end function gets the position where a thing begins and returns the one
-- behind it; a fault at position i is returned as -1 - i.

local function skip_space(p, i)
  while SPACE[p[i]] ~= 0 do i = i + 1 end
  return i
end

local last_four = 0 -- the last position that four bytes of the body can be read from

-- i: behind the opening quote, or anywhere in the string
local function string_end(p, i)
  while true do
    -- four at a time: 35 instead of 88 us for 100 KB of plain text, and no loss where escapes are dense
    while i <= last_four and SPECIAL[p[i]] + SPECIAL[p[i + 1]] + SPECIAL[p[i + 2]] + SPECIAL[p[i + 3]] == 0 do
      i = i + 4
    end
    while SPECIAL[p[i]] == 0 do i = i + 1 end
    local c = p[i]
    if c == QUOTE then return i + 1 end
    if c ~= BACKSLASH then return -1 - i end
    local kind = ESCAPE[p[i + 1]]
    if kind == 1 then
      i = i + 2
    elseif
      kind == 2 and HEX[p[i + 2]] ~= 0 and HEX[p[i + 3]] ~= 0 and HEX[p[i + 4]] ~= 0 and HEX[p[i + 5]] ~= 0
    then
      i = i + 6
    else
      return -1 - i
    end
  end
end

local function number_end(p, i)
  if p[i] == MINUS then i = i + 1 end
  if p[i] == ZERO then
    i = i + 1
  else
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  if p[i] == DOT then
    i = i + 1
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  if p[i] == 101 or p[i] == 69 then -- e, E
    i = i + 1
    if p[i] == PLUS or p[i] == MINUS then i = i + 1 end
    if DIGIT[p[i]] == 0 then return -1 - i end
    while DIGIT[p[i]] ~= 0 do i = i + 1 end
  end
  return i
end

local function literal_end(p, i)
  if p[i] == 116 and p[i + 1] == 114 and p[i + 2] == 117 and p[i + 3] == 101 then return i + 4 end -- true
  if p[i] == 110 and p[i + 1] == 117 and p[i + 2] == 108 and p[i + 3] == 108 then return i + 4 end -- null
  if p[i] == 102 and p[i + 1] == 97 and p[i + 2] == 108 and p[i + 3] == 115 and p[i + 4] == 101 then -- false
    return i + 5
  end
  return -1 - i
end

-- i: at the opening quote of a key. Returns where its value begins.
local function key_end(p, i)
  if p[i] ~= QUOTE then return -1 - i end
  i = string_end(p, i + 1)
  if i < 0 then return i end
  i = skip_space(p, i)
  if p[i] ~= COLON then return -1 - i end
  return skip_space(p, i + 1)
end

local open = ffi.new("uint8_t[?]", MAX_DEPTH + 1) -- the opening bracket of each container around position i
local fault -- what is wrong at the position that is returned

-- depth: containers open around this value. Not recursive: the client chooses how deep a body is.
local function value_end(p, i, depth)
  local outside = depth
  while true do
    local c = p[i]
    if c == QUOTE then
      i = string_end(p, i + 1)
    elseif c == OBJECT or c == ARRAY then
      if depth == MAX_DEPTH then
        fault = "more than 512 levels of nesting"
        return -1 - i
      end
      depth = depth + 1
      open[depth] = c
      i = skip_space(p, i + 1)
      if p[i] == c + 2 then -- } is { + 2, and ] is [ + 2
        depth = depth - 1
        i = i + 1
      else
        if c == OBJECT then
          i = key_end(p, i)
          if i < 0 then return i end
        end
        goto next_value
      end
    elseif c == MINUS or DIGIT[c] ~= 0 then
      i = number_end(p, i)
    else
      i = literal_end(p, i)
    end
    if i < 0 then return i end
    -- a value ended at i: the containers that end with it, up to the next value
    while true do
      if depth == outside then return i end
      i = skip_space(p, i)
      c = p[i]
      if c == COMMA then
        i = skip_space(p, i + 1)
        if open[depth] == OBJECT then
          i = key_end(p, i)
          if i < 0 then return i end
        end
        break
      elseif c == open[depth] + 2 then
        depth = depth - 1
        i = i + 1
      else
        return -1 - i
      end
    end
    ::next_value::
  end
end

local UNESCAPED = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

local function utf8(code)
  if code < 0x80 then return string.char(code) end
  if code < 0x800 then return string.char(0xC0 + math.floor(code / 0x40), 0x80 + code % 0x40) end
  local tail = string.char(0x80 + math.floor(code / 0x40) % 0x40, 0x80 + code % 0x40)
  if code < 0x10000 then return string.char(0xE0 + math.floor(code / 0x1000)) .. tail end
  return string.char(0xF0 + math.floor(code / 0x40000), 0x80 + math.floor(code / 0x1000) % 0x40) .. tail
end

-- The value of a valid JSON string, given the text between its quotes; not all of it when longer than limit.
local function unescape(text, limit)
  local out, length, at = {}, 0, 1
  while length <= limit do
    local slash = find(text, "\\", at, true)
    local piece = sub(text, at, (slash or 0) - 1)
    if slash then
      local c = sub(text, slash + 1, slash + 1)
      at = slash + 2
      if c == "u" then
        local code = tonumber(sub(text, at, at + 3), 16)
        at = at + 4
        local low = match(text, "^\\u([dD][c-fC-F]%x%x)", at)
        if low and code >= 0xD800 and code < 0xDC00 then
          code = 0x10000 + (code - 0xD800) * 0x400 + tonumber(low, 16) - 0xDC00
          at = at + 6
        end
        piece = piece .. utf8(code)
      else
        piece = piece .. (UNESCAPED[c] or c)
      end
    end
    out[#out + 1] = piece
    length = length + #piece
    if not slash then break end
  end
  return concat(out)
end

local function quote(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return ("\\u%04x"):format(byte(c)) end) .. '"'
end

-- --------------------------------------------------------------------------------------------------
-- The merge plan: what filter_context says, ready for the splice. A node stands for one object, the body or
-- an object in it; an entry stands for a member of it.
--   node:  {entries = in configured order, by_key, lengths = set of key lengths, longest,
--           text = all entries, for insertion; in the root also model = its entry, with the name for logs}
--   entry: {key, value, text = '"key":value', force, node = of the inner object or nil,
--           seen = mark of the last pass that met it}

local function new_node()
  return { entries = {}, by_key = {}, lengths = {}, longest = 0 }
end

local function add_entry(node, key)
  local entry = { key = key, seen = 0 }
  node.by_key[key] = entry
  node.lengths[#key] = true
  node.longest = math.max(node.longest, #key)
  return entry
end

local function finish(node)
  local texts = {}
  for n, entry in ipairs(node.entries) do
    if entry.node then
      finish(entry.node)
      entry.value = "{" .. entry.node.text .. "}"
    end
    entry.text = quote(entry.key) .. ":" .. entry.value
    texts[n] = entry.text
  end
  node.text = concat(texts, ",")
end

local MODEL_LENGTH = 128

-- A model for logs and metrics, from JSON text: cut and made printable; nil if it is no string or empty.
local function model_name(text)
  if byte(text) ~= QUOTE then return nil end
  local name = sub(text, 2, -2)
  if find(name, "\\", 1, true) then name = unescape(name, MODEL_LENGTH) end
  name = sub(name, 1, MODEL_LENGTH):gsub("[^ -~]", "?")
  return name ~= "" and name or nil
end

local function merge_plan(members)
  local root = new_node()
  for n = 2, #members do -- behind the operation's text
    local member = members[n]
    local force, value, key, inner = member[1] == "force", member[2], member[3], member[4]
    local entry = root.by_key[key]
    if not entry then
      entry = add_entry(root, key)
      root.entries[#root.entries + 1] = entry
    end
    if inner then
      entry.node = entry.node or new_node()
      local leaf = add_entry(entry.node, inner)
      entry.node.entries[#entry.node.entries + 1] = leaf
      leaf.value, leaf.force = value, force
    else
      entry.value = value
    end
    entry.force = entry.force or force -- an inner member that is forced replaces a value that is no object
  end
  finish(root)
  -- the model is looked at even where nothing is configured for it
  root.model = root.by_key.model or add_entry(root, "model")
  root.model.name = root.model.value and model_name(root.model.value)
  return root
end

local function provider_plan(context)
  local plan = { host = context:get("host"), operations = {} }
  local prefix, served = context:get("prefix"), {}
  for n, listed in ipairs(context:get("operations")) do
    local spliced = type(listed) == "table"
    local method, suffix, path = match(spliced and listed[1] or listed, "^(%S+) (%S+) ?(%S*)$")
    plan.operations[n] = {
      method = method,
      suffix = suffix,
      path = path ~= "" and path or prefix .. suffix,
      root = spliced and merge_plan(listed) or nil,
    }
    served[n] = method .. " " .. suffix
  end
  plan.own = plan.operations[1]
  plan.served = concat(served, ", ")
  return plan
end

-- Plans are kept in the VM, which all providers of a worker share (shared_vm_id). A changed provider has a
-- new id and its old plan stays behind: when there are too many, all go, and those in use are made again.
local MAX_PLANS = 1024
local plans, plan_count = {}, 0

local function plan_of(context)
  local id = context:get("id")
  local plan = plans[id]
  if not plan then
    if plan_count == MAX_PLANS then
      plans, plan_count = {}, 0
    end
    plan = provider_plan(context)
    plans[id], plan_count = plan, plan_count + 1
  end
  return plan
end

-- --------------------------------------------------------------------------------------------------
-- The splice

-- Edits of one pass in the order of their places: edit_text replaces the bytes from edit_from up to edit_to.
local edit_from, edit_to, edit_text, edits = {}, {}, {}, 0
-- A key that is repeated a million times must not become a million times a long configured value.
local MAX_EDITS = 1000
local model_from, model_to -- the value of the last "model" member of the body
local mark = 0

local function edit(from, to, text)
  edits = edits + 1
  edit_from[edits], edit_to[edits], edit_text[edits] = from, to, text
end

-- What is to be inserted into an object: the entries that this pass did not meet in it.
local function missing(node, pass, met)
  if met == 0 then return node.text end
  local texts = {}
  for _, entry in ipairs(node.entries) do
    if entry.seen ~= pass then texts[#texts + 1] = entry.text end
  end
  return concat(texts, ",")
end

-- The entry for the key between the quotes at from - 1 and to, or nil.
local function entry_of(node, s, from, to, escaped)
  if escaped then return node.by_key[unescape(sub(s, from + 1, to), node.longest)] end
  if node.lengths[to - from] then return node.by_key[sub(s, from + 1, to)] end
  return nil
end

-- The object at p[i], whose members are to be merged with those of node. Each occurrence of a key counts: a
-- parser may take the first or the last of two equal keys, and neither may find what the client sent for a
-- forced member.
local function object_end(s, p, i, node, depth)
  mark = mark + 1
  local pass, met = mark, 0
  edit(i + 1, i + 1, "")
  local insertion = edits
  i = skip_space(p, i + 1)
  local empty = p[i] == OBJECT_END
  while not empty do
    local key = i + 1
    if p[i] ~= QUOTE then return -1 - i end
    i = key
    while SPECIAL[p[i]] == 0 do i = i + 1 end
    local escaped = p[i] == BACKSLASH
    i = string_end(p, i)
    if i < 0 then return i end
    local entry = entry_of(node, s, key, i - 1, escaped)
    i = skip_space(p, i)
    if p[i] ~= COLON then return -1 - i end
    i = skip_space(p, i + 1)
    local value = i
    if entry and entry.node and p[i] == OBJECT then
      i = object_end(s, p, i, entry.node, depth + 1)
      if i < 0 then return i end
    else
      i = value_end(p, i, depth)
      if i < 0 then return i end
      if entry and entry.force then edit(value, i, entry.value) end
    end
    if entry then
      if edits > MAX_EDITS then
        fault = "too many equal keys"
        return -1 - value
      end
      entry.seen, met = pass, met + 1
      if entry == node.model then model_from, model_to = value, i end
    end
    i = skip_space(p, i)
    if p[i] == OBJECT_END then break end
    if p[i] ~= COMMA then return -1 - i end
    i = skip_space(p, i + 1)
  end
  local text = missing(node, pass, met)
  if text ~= "" and not empty then text = text .. "," end
  edit_text[insertion] = text
  return i + 1
end

-- Where the result is put together; kept, unless it got large: fresh memory costs as much as the pass itself.
local output = require("string.buffer").new()
local KEPT_OUTPUT = 4 * 1024 * 1024

-- Returns the body with the members of root merged in, and its model or nil; or nil and what is wrong.
local function splice(s, root)
  local p = ffi.cast("const uint8_t *", s)
  edits, model_from, last_four, fault = 0, nil, #s - 4, "invalid JSON"
  local i = skip_space(p, 0)
  if p[i] ~= OBJECT then return nil, ("a JSON object is expected at byte %d"):format(i) end
  i = object_end(s, p, i, root, 1)
  if i >= 0 then
    i = skip_space(p, i)
    if i ~= #s then i = -1 - i end
  end
  if i < 0 then return nil, ("%s at byte %d"):format(fault, -1 - i) end

  local model = root.model.name
  if model_from and not root.model.force then model = model_name(sub(s, model_from + 1, model_to)) end

  output:reset()
  local copied = 0
  for n = 1, edits do
    output:putcdata(p + copied, edit_from[n] - copied):put(edit_text[n])
    copied = edit_to[n]
  end
  local result = output:putcdata(p + copied, #s - copied):tostring()
  if #s > KEPT_OUTPUT then output:free() end
  return result, model
end

-- --------------------------------------------------------------------------------------------------
-- The request

-- The metadata flag tells the listener's local_reply_config that the body is JSON already.
local function refuse(h, status, code, message, allow)
  h:streamInfo():dynamicMetadata():set("llm", "error", true)
  local kind = status == "500" and "server_error" or "invalid_request_error"
  h:respond(
    { [":status"] = status, ["content-type"] = "application/json", allow = allow },
    ('{"error":{"message":%s,"type":"%s","param":null,"code":"%s"}}'):format(quote(message), kind, code)
  )
end

-- Header changes of an attempt are there in the next one; the client's path is kept in filter state, which no
-- client can write. Returns it, and whether this is a later attempt.
local function client_path(state, headers)
  local kept = state:get("llm.path")
  if kept then return kept, true end
  local path = headers:get(":path") or ""
  state:set("llm.path", "envoy.string", path)
  return path, false
end

-- Returns the operation that the client's path (without query) names; or nil and the path's methods, if any.
local function operation_of(plan, method, path)
  if path == "" or path == "/" then
    if method == "POST" then return plan.own end
    return nil, "POST"
  end
  local longest, found, allow = 0, nil, nil
  for _, operation in ipairs(plan.operations) do
    local suffix = operation.suffix
    if #suffix >= longest and sub(path, -#suffix) == suffix then
      if #suffix > longest then
        longest, found, allow = #suffix, nil, nil
      end
      allow = allow and allow .. ", " .. operation.method or operation.method
      if operation.method == method then found = operation end
    end
  end
  return found, allow
end

local MODEL_STATE = "wasm.asm.llmproxy.request_model" -- filter state that logs and metrics read

local function handle(h)
  local plan = plan_of(h:filterContext())
  local headers = h:headers()
  local state = h:streamInfo():filterState()
  local target, again = client_path(state, headers)
  local method = headers:get(":method")
  -- The injector of the attempt before has written its key here, and a provider without one would get it. What
  -- else must not leave, the listener and the routes remove once.
  headers:remove("authorization")
  headers:replace(":authority", plan.host)

  local query = find(target, "?", 1, true)
  local operation, allow = operation_of(plan, method, query and sub(target, 1, query - 1) or target)
  if not operation then
    if allow then return refuse(h, "405", "method_not_allowed", "Allowed here: " .. allow .. ".", allow) end
    return refuse(h, "404", "unknown_url", "Unknown request path. Served here: " .. plan.served .. ".")
  end

  if not operation.root then
    local path = operation.path
    if query then path = path .. (find(path, "?", 1, true) and "&" or "?") .. sub(target, query + 1) end
    headers:replace(":path", path)
    if again then -- an attempt before may have left a model, and the length of the body that it made
      state:set(MODEL_STATE, "envoy.string", "")
      if headers:get("content-length") then
        local body = h:body(true)
        body:setBytes(body:getBytes(0, body:length()))
      end
    end
    return
  end

  headers:replace(":path", operation.path)
  local encoding = headers:get("content-encoding") or "identity"
  if encoding:lower() ~= "identity" then
    return refuse(h, "415", "unsupported_content_encoding", "The request body must not be compressed.")
  end
  local content_type = headers:get("content-type") or ""
  if sub(content_type, 1, 10):lower() == "multipart/" then
    return refuse(h, "415", "unsupported_media_type", "The request body must be JSON.")
  end
  if content_type ~= "application/json" then headers:replace("content-type", "application/json") end

  local forced = operation.root.model.force and operation.root.model.name
  if forced then state:set(MODEL_STATE, "envoy.string", forced) end
  local body = h:body(true) -- waits for the whole body; `headers` and `state` are dead from here on
  local size = body:length()
  if size == 0 then return refuse(h, "400", "empty_body", "The request body is empty.") end
  local text = body:getBytes(0, size) -- held here while splice reads it through a pointer
  local spliced, model = splice(text, operation.root)
  if not spliced then
    return refuse(h, "400", "invalid_json", "The request body cannot be used: " .. model .. ".")
  end
  body:setBytes(spliced) -- also when nothing changed: it sets content-length, which may be another attempt's
  if not forced and (model or again) then
    h:streamInfo():filterState():set(MODEL_STATE, "envoy.string", model or "")
  end
end

-- Envoy lets a request pass unchanged when a script fails. Here it would pass with the provider's key.
function envoy_on_request(h)
  local ok, err = pcall(handle, h)
  if not ok then
    h:logErr("llm_provider: " .. tostring(err))
    refuse(h, "500", "internal_error", "The proxy could not prepare the request.")
  end
end

-- Traces of these functions would not pay: they consist of calls into Envoy, which LuaJIT does not compile,
-- and it would make a new trace for each header name that it meets. The scanner is what is to be compiled.
local interpreted = { envoy_on_request, handle, operation_of, client_path, refuse, plan_of }
for _, f in ipairs(interpreted) do jit.off(f) end
